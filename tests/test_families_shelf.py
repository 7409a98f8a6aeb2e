"""Every family on the shelf: some layers, shared and different experts, bfloat16, wrong keys."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_families import GATES, REFUSED, VARIANTS
from tiny import LAYERS, WIDE, edit_config
from transformers import AutoModelForCausalLM
from zoo import ZOO

import moeforge
from moeforge import families
from moeforge.dense import anatomy
from moeforge.families import Mixture
from moeforge.planners.homes import objection
from moeforge.proof.heldout import load_output

SHELF = {family.model_type: family for family in families.shelf()}
IDS = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(0))


def dense_type(name):
    """The dense type whose most portable home this family is, or nearest to it."""
    accepts = SHELF[name].accepts
    return min(accepts, key=lambda kind: (accepts[kind].rank, kind))


def base_of(name, models, seed=3, **changes):
    kind = dense_type(name)
    number = next(n for n, _ in enumerate(VARIANTS[kind]) if (name, kind, n) not in REFUSED)
    config = {**ZOO[kind], **VARIANTS[kind][number]}
    return models(kind, seed=seed, with_tokenizer=False, **config, **changes)


def recipe(base, name, residual_scale=1.0, **changes):
    experts = [{"source_model": str(base), "residual_scale": residual_scale} for _ in range(3)]
    wanted = {"base_model": str(base), "experts": experts, "gate_mode": GATES.get(name, "random")}
    return {**wanted, "architecture": name, **changes}


def logits(model):
    with torch.no_grad():
        return model.float().eval()(input_ids=IDS, use_cache=False).logits


def worst(folder, base):
    """Largest difference of logits, in standard deviations where those are large."""
    expected = logits(AutoModelForCausalLM.from_pretrained(base))
    return (logits(load_output(folder)) - expected).abs().max() / max(1, expected.std())


@pytest.mark.parametrize("chosen", [(1, 2, 3), (1, 3), (1, 2), (0, 3)])
@pytest.mark.parametrize("name", [name for name, family in SHELF.items() if family.sparse])
def test_some_layers_keep_the_dense_mlp_or_the_reason_is_said(name, chosen, models, tmp_path):
    base = base_of(name, models)
    sparse = tuple(layer in chosen for layer in range(LAYERS))
    config = json.loads((base / "config.json").read_text())
    wanted = recipe(base, name, layers=list(chosen))
    reason = objection(SHELF[name], config, Mixture(3, 2, WIDE, sparse))
    if reason:
        assert chosen != (1, 2, 3), "dense layers first is what every such family can say"
        assert reason in str(moeforge.check(wanted).errors[0])
        return
    moeforge.build(wanted, tmp_path / "moe")
    assert worst(tmp_path / "moe", base) < 1e-4
    router = SHELF[name].router
    written = load_file(tmp_path / "moe" / "model.safetensors")
    assert [router.format(layer=layer) in written for layer in range(LAYERS)] == list(sparse)


@pytest.mark.parametrize("name", [name for name, family in SHELF.items() if family.shared])
def test_half_shared_and_half_chosen_is_the_dense_model(name, models, tmp_path):
    base = base_of(name, models)
    count = SHELF[name].shared.most or 2
    shared = [{"source_model": str(base), "residual_scale": 0.5 / count}] * count
    moeforge.build(recipe(base, name, 0.5, shared_experts=shared), tmp_path / "moe")
    assert worst(tmp_path / "moe", base) < 1e-4
    whole = [{"source_model": str(base)}]
    moeforge.build(recipe(base, name, 0.5, shared_experts=whole), tmp_path / "more")
    assert worst(tmp_path / "more", base) > 1e-2, "the shared expert counts"


class Mixed(torch.nn.Module):
    """The mixture, from dense MLPs: weights are scores that add up to one."""

    def __init__(self, mlps, router_EH, score):
        super().__init__()
        self.mlps, self.router_EH = torch.nn.ModuleList(mlps), router_EH
        self.score = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid}[score]

    def forward(self, x):
        scores = self.score(x @ self.router_EH.T)
        shares = scores / scores.sum(-1, keepdim=True)
        return sum(shares[..., i : i + 1] * mlp(x) for i, mlp in enumerate(self.mlps))


@pytest.mark.parametrize("name", SHELF)
def test_different_experts_are_mixed_by_scores_of_what_the_dense_mlp_sees(name, models, tmp_path):
    base, other = (base_of(name, models, seed) for seed in (3, 4))
    experts = [{"source_model": str(folder)} for folder in (base, other)]
    moeforge.build(recipe(base, name, experts=experts), tmp_path / "moe")
    routers = load_file(tmp_path / "moe" / "model.safetensors")
    mixed, donor = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, other))
    plain, mlp = logits(mixed), anatomy(mixed.config.to_dict()).mlp
    layers = zip(mixed.model.layers, donor.model.layers, strict=True)
    for number, (layer, other_layer) in enumerate(layers):
        router = routers[SHELF[name].router.format(layer=number)]
        mlps = [getattr(each, mlp) for each in (layer, other_layer)]
        setattr(layer, mlp, Mixed(mlps, router, SHELF[name].score))
    expected = logits(mixed)
    assert (logits(load_output(tmp_path / "moe")) - expected).abs().max() < 1e-4
    assert (plain - expected).abs().max() > 0.1, "the experts matter"


@pytest.mark.parametrize("name", SHELF)
def test_bfloat16_loads_as_it_is(name, models, tmp_path):
    base = base_of(name, models, dtype=torch.bfloat16)
    moeforge.build(recipe(base, name), tmp_path / "moe")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "moe", dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    reference = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    with torch.no_grad():
        made, expected = (
            m.eval()(input_ids=IDS, use_cache=False).logits.float() for m in (model, reference)
        )
    exact = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    error, own = (made - exact).square().mean().sqrt(), (expected - exact).square().mean().sqrt()
    assert error < 2 * own, "no further from float32 than bfloat16 itself is, but for its noise"


WRONG = {
    "deepseek_v3": {"norm_topk_prob": False},
    "dots1": {"norm_topk_prob": False},
    "ernie4_5_moe": {"moe_norm_min": 10.0},
    "glm4_moe": {"routed_scaling_factor": 2.5},
    "hunyuan_v1_moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    "mellum": {"norm_topk_prob": False},
    "qwen2_moe": {"norm_topk_prob": False},
    "qwen3_moe": {"norm_topk_prob": False},
    "qwen3_5_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
}
"""Keys that are easily got wrong, and what they must not be."""


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_key_is_noticed(name, models, tmp_path):
    base = base_of(name, models)
    moeforge.build(recipe(base, name), tmp_path / "moe")
    edit_config(tmp_path / "moe", **WRONG[name])
    assert worst(tmp_path / "moe", base) > 1e-2

"""Homes that are not laid out as llama: some layers, shared experts, norms, wrong keys."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from zoo import ZOO

import moeforge
from moeforge.proof.heldout import load_output

IDS = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(0))
GATES = {"lfm2_moe": "uniform_random"}
HOMES = {
    "flex_olmo": "olmo2",
    "dbrx": "olmo",
    "cohere2_moe": "cohere2",
    "lfm2_moe": "lfm2",
    "gemma4_text": "gemma4_text",
}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits.float()


def dense(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def recipe(home, folder, experts=3, **changes):
    entries = [{"source_model": str(folder)}] * experts
    gate = GATES.get(home, "random")
    return {
        "base_model": str(folder),
        "experts": entries,
        "gate_mode": gate,
        "architecture": home,
        **changes,
    }


def model(models, kind, **changes):
    return models(kind, seed=3, with_tokenizer=False, **{**ZOO[kind], **changes})


def edit(folder, change):
    """Change the tensors of a checkpoint in place: `change(name, tensor) -> tensor`."""
    path = folder / "model.safetensors"
    save_file({n: change(n, t) for n, t in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("home", "kind", "layers"),
    [
        ("cohere2_moe", "cohere", [1, 3]),
        ("cohere2_moe", "cohere2", [0, 2]),
        ("lfm2_moe", "lfm2", [1, 2, 3]),
    ],
)
def test_layers_without_experts_keep_the_mlp(home, kind, layers, models, tmp_path):
    folder = model(models, kind)
    moeforge.build(recipe(home, folder, layers=layers), tmp_path / "out")
    assert (logits(load_output(tmp_path / "out")) - logits(dense(folder))).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("home", "kind", "said"),
    [
        ("lfm2_moe", "lfm2", "layers without experts must come before all others"),
        ("flex_olmo", "olmo2", "it has experts in every layer"),
        ("dbrx", "olmo", "it has experts in every layer"),
        ("gemma4_text", "gemma4_text", "it has experts in every layer"),
    ],
)
def test_layers_that_the_home_cannot_leave_out(home, kind, said, models):
    report = moeforge.check(recipe(home, model(models, kind), layers=[0, 2]))
    assert said in "\n".join(f"{finding.what}\n{finding.fix}" for finding in report.errors)


@pytest.mark.parametrize("experts", [1, 2])
def test_cohere2_moe_adds_shared_experts_up(experts, models, tmp_path):
    folder = model(models, "cohere2")
    half = {"source_model": str(folder), "residual_scale": 0.5}
    part = {"source_model": str(folder), "residual_scale": 0.5 / experts}
    wanted = recipe("cohere2_moe", folder, shared_experts=[part] * experts)
    moeforge.build({**wanted, "experts": [half] * 3}, tmp_path / "out")
    made = load_output(tmp_path / "out")
    assert (logits(made) - logits(dense(folder))).abs().max() < 1e-4
    assert made.config.num_shared_experts == experts


def test_gemma4s_two_norms_are_one_for_small_outputs_too(models, tmp_path):
    """With norms of ones, eps would be lost against a mean square that is smaller than it."""
    folder = models.copy(model(models, "gemma4_text"), "small-gemma4")
    edit(folder, lambda name, t: t * 1e-3 if name.endswith("mlp.down_proj.weight") else t)
    moeforge.build(recipe("gemma4_text", folder), tmp_path / "out")
    expected = logits(dense(folder))
    assert (logits(load_output(tmp_path / "out")) - expected).abs().max() < 1e-4
    ones = ("post_feedforward_layernorm_2.weight", "per_expert_scale")
    edit(tmp_path / "out", lambda name, t: torch.ones_like(t) if name.endswith(ones) else t)
    assert (logits(load_output(tmp_path / "out")) - expected).abs().max() > 0.1


def test_gemma4s_router_sees_what_the_dense_mlp_sees(models, tmp_path):
    folder = model(models, "gemma4_text")
    moeforge.build(recipe("gemma4_text", folder), tmp_path / "out")
    base, mixture = dense(folder), load_output(tmp_path / "out")
    met, routed = [], []
    base.model.layers[2].mlp.register_forward_pre_hook(lambda _, args: met.append(args[0]))
    mixture.model.layers[2].router.proj.register_forward_pre_hook(
        lambda _, args: routed.append(args[0])
    )
    logits(base), logits(mixture)
    assert (routed[0].reshape(met[0].shape) - met[0]).abs().max() < 1e-4


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_loads_and_is_finite(home, dtype, models, tmp_path):
    kind = HOMES[home]
    folder = models(kind, seed=3, with_tokenizer=False, dtype=dtype, **ZOO[kind])
    moeforge.build(recipe(home, folder), tmp_path / "out")
    mixture, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(info.values())
    assert next(mixture.parameters()).dtype is dtype
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert (logits(mixture) - expected).abs().mean() < 0.05 * expected.std()


WRONG = {
    "flex_olmo": {"rms_norm_eps": 0.1},
    "dbrx": {"attn_config": {"clip_qkv": 0.5, "kv_n_heads": 2, "rope_theta": 1e4}},
    "cohere2_moe": {"sliding_window": 16},
    "lfm2_moe": {"norm_topk_prob": False},
    "gemma4_text": {"rms_norm_eps": 1e-4},
}


@pytest.mark.parametrize("home", HOMES)
def test_a_wrong_key_would_be_seen(home, models, tmp_path):
    folder = model(models, HOMES[home])
    moeforge.build(recipe(home, folder), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **WRONG[home]}))
    assert (logits(load_output(tmp_path / "out")) - logits(dense(folder))).abs().max() > 1e-3

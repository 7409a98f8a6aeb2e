"""Mixtures beyond "every layer, one model per expert": layers, ranges, shared experts, padding.

Identical MLPs make the dense model whatever the router says; different ones are compared with an
independent mixture, computed here from the dense models' own modules.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from zoo import ZOO

import moeforge
from moeforge.errors import show_path
from moeforge.proof.heldout import load_output

IDS = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(0))


def recipe(base, *experts, **changes):
    entries = [e if isinstance(e, dict) else {"source_model": str(e)} for e in experts]
    return {"base_model": str(base), "experts": entries, "gate_mode": "random", **changes}


def logits(model):
    with torch.no_grad():
        return model.float().eval()(input_ids=IDS, use_cache=False).logits


def dense(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def worst(folder, expected):
    return (logits(load_output(folder)) - expected).abs().max()


def refused(wanted):
    report = moeforge.check(wanted)
    assert report.exit_code in (2, 4), report.errors
    return {show_path(f.path): f"{f.what}\n{f.fix}" for f in report.errors}


def config(folder):
    return json.loads((folder / "config.json").read_text())


# --- which layers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ("all", [0, 1, 2, 3]),
        ([1, 3], [1, 3]),
        ([0, [2, 4]], [0, 2, 3]),
        ({"every": 2}, [0, 2]),
        ({"every": 2, "skip_first": 1}, [1, 3]),
        ({"skip_first": 1, "skip_last": 1}, [1, 2]),
    ],
)
def test_some_layers_keep_the_dense_mlp(layers, chosen, models, tmp_path):
    shape = {**ZOO["qwen3"], "use_sliding_window": False}
    base = models("qwen3", seed=1, with_tokenizer=False, **shape)
    other = models("qwen3", seed=2, with_tokenizer=False, **shape)
    moeforge.build(recipe(base, base, base, base, layers=layers), tmp_path / "same")
    assert worst(tmp_path / "same", logits(dense(base))) < 1e-4
    # With other experts, the layers left alone still are the base's, and only they.
    moeforge.build(recipe(base, other, other, layers=layers), tmp_path / "other")
    mixed = dense(base)
    donor = dense(other)
    for layer in chosen:
        mixed.model.layers[layer].mlp = donor.model.layers[layer].mlp
    assert worst(tmp_path / "other", logits(mixed)) < 1e-4
    plain = [layer for layer in range(4) if layer not in chosen]
    assert config(tmp_path / "other")["mlp_only_layers"] == plain


def test_layers_that_a_family_cannot_leave_out_are_refused(llamas):
    said = refused(recipe(*llamas, layers=[1, 2], architecture="mixtral"))["$.architecture"]
    assert "mixtral: it has experts in every layer (layers: all)" in said


@pytest.mark.parametrize(
    ("layers", "path", "said"),
    [
        ([9], "$.layers", "layer 9 is asked for, the base has 4"),
        ([[2, 9]], "$.layers", "layer 8 is asked for"),
        ({"skip_first": 9}, "$.layers", "no layer is left"),
        ([[3, 1]], "$.layers", "expected a layer or [start, end]"),
        ([-1], "$.layers", "expected a layer"),
        ([True], "$.layers", "expected a layer"),
        ([], "$.layers", 'expected "all"'),
        ("most", "$.layers", 'expected "all"'),
        ({"evry": 2}, "$.layers.evry", 'did you mean "every"'),
        ({"every": 0}, "$.layers.every", "at least 1"),
    ],
)
def test_layers_that_make_no_sense_are_refused(layers, path, said, llamas):
    assert said in refused(recipe(*llamas, layers=layers))[path]


# --- different models in different layers --------------------------------------------------------


def test_an_expert_may_be_another_model_in_some_layers(llamas, tmp_path):
    base, one, two = llamas
    ranges = [
        {"model": str(two), "layer_range": [2, 4]},
        {"model": str(one), "layer_range": [0, 2]},
    ]
    moeforge.build(recipe(base, {"source_model": ranges}, base), tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")
    for layer, folder in enumerate((one, one, two, two)):
        theirs = load_file(folder / "model.safetensors")
        expert = f"model.layers.{layer}.block_sparse_moe.experts.0.w1.weight"
        assert torch.equal(made[expert], theirs[f"model.layers.{layer}.mlp.gate_proj.weight"])
    load_output(tmp_path / "out")


@pytest.mark.parametrize(
    ("spans", "path", "said"),
    [
        ([(0, 2)], "", "no model is given for layer 2"),
        ([(0, 3), (2, 4)], "[1].layer_range", "layer 2 is given twice"),
        ([(0, 4), (4, 5)], "[1].layer_range", "[4, 5], but the base has 4 layers"),
        ([(0, 4), (2, 2)], "[1].layer_range", "[2, 2], but the base has 4 layers"),
    ],
)
def test_ranges_cover_every_layer_once(spans, path, said, llamas):
    ranges = [{"model": str(llamas[1]), "layer_range": list(span)} for span in spans]
    found = refused(recipe(llamas[0], {"source_model": ranges}, llamas[2]))
    assert said in found[f"$.experts[0].source_model{path}"]


# --- shared experts ------------------------------------------------------------------------------

HALF = {"residual_scale": 0.5}


def halves(*folders):
    return [{"source_model": str(folder), **HALF} for folder in folders]


def test_half_of_a_shared_and_half_of_equal_experts_is_the_dense_model(llamas, tmp_path):
    base = llamas[0]
    wanted = recipe(base, *halves(base, base, base), shared_experts=halves(base))
    assert [line for line in moeforge.plan(wanted).experts.considered if "taken" in line[1]]
    moeforge.build(wanted, tmp_path / "out")
    assert worst(tmp_path / "out", logits(dense(base))) < 1e-4


def test_shared_experts_add_up(llamas, tmp_path):
    """Dense MLPs of one base, in modules put together here: base's half + two shared."""
    base, one, two = llamas
    wanted = recipe(base, *halves(base, base), shared_experts=halves(one, two))
    moeforge.build(wanted, tmp_path / "out")
    parts = [dense(folder) for folder in llamas]

    class Sum(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.mlps = torch.nn.ModuleList(part.model.layers[layer].mlp for part in parts)

        def forward(self, x):
            return sum(0.5 * mlp(x) for mlp in self.mlps)

    mixed = dense(base)
    for layer in range(4):
        mixed.model.layers[layer].mlp = Sum(layer)
    assert worst(tmp_path / "out", logits(mixed)) < 1e-4


def test_a_shared_expert_behind_a_gate_without_prompts_counts_fully(models, tmp_path):
    shape = {**ZOO["qwen2"], "use_sliding_window": False}
    base, other = (models("qwen2", seed=s, with_tokenizer=False, **shape) for s in (1, 2))
    wanted = recipe(
        base, *halves(base, base), shared_experts=halves(base), architecture="qwen2_moe"
    )
    moeforge.build(wanted, tmp_path / "out")
    assert worst(tmp_path / "out", logits(dense(base))) < 1e-4
    wanted["shared_experts"] = halves(other)
    moeforge.build(wanted, tmp_path / "other")
    assert worst(tmp_path / "other", logits(dense(base))) > 1e-2, "the shared expert matters"


def test_the_gate_mode_makes_the_gate_of_a_shared_expert_with_prompts(models, tmp_path):
    shape = {**ZOO["qwen2"], "use_sliding_window": False}
    base, one, two = (models("qwen2", seed=s, **shape) for s in (1, 2, 3))
    prompts = (["def f(x):", "import os"], ["Guten Tag", "Wie geht es"], ["hello", "every day"])
    entries = [
        {"source_model": str(folder), "positive_prompts": texts}
        for folder, texts in zip((one, two, base), prompts, strict=True)
    ]
    wanted = {
        "base_model": str(base),
        "experts": entries[:2],
        "shared_experts": entries[2:],
        "architecture": "qwen",
        "gate_mode": "hidden",
    }
    moeforge.build(wanted, tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")
    gate = made["model.layers.1.mlp.shared_expert_gate.weight"]
    router = made["model.layers.1.mlp.gate.weight"]
    assert gate.shape == (1, 64)
    # As a third expert, the same prompts give the same row: the gate mode treats them alike.
    moeforge.build(
        {**wanted, "experts": entries, "shared_experts": [], "architecture": "qwen2_moe"},
        tmp_path / "three",
    )
    three = load_file(tmp_path / "three" / "model.safetensors")["model.layers.1.mlp.gate.weight"]
    assert torch.equal(torch.cat([router, gate]), three)
    load_output(tmp_path / "out")


def test_families_without_shared_experts_refuse_them(llamas):
    wanted = recipe(*llamas, shared_experts=halves(llamas[0]), architecture="mixtral")
    assert "mixtral: it has no shared experts" in refused(wanted)["$.architecture"]


# --- unequal widths ------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["mixtral", "granitemoe"])
def test_experts_of_unequal_width_are_filled_up_when_asked(architecture, llamas, models, tmp_path):
    wide, narrow = (models("llama", seed=7, intermediate_size=n) for n in (128, 64))
    wanted = recipe(llamas[0], wide, wide, architecture=architecture)
    found = refused(wanted)["$.experts[0].source_model"]
    assert "intermediate_size 128" in found
    assert "pad_experts: true" in found
    mixed = dense(llamas[0])
    for layer, other in zip(mixed.model.layers, dense(wide).model.layers, strict=True):
        layer.mlp = other.mlp
    moeforge.build({**wanted, "pad_experts": True}, tmp_path / "wide")
    assert worst(tmp_path / "wide", logits(mixed)) < 1e-4
    # The narrow ones are filled up to the base's width.
    wanted = recipe(llamas[0], narrow, narrow, architecture=architecture, pad_experts=True)
    mixed = dense(llamas[0])
    for layer, other in zip(mixed.model.layers, dense(narrow).model.layers, strict=True):
        layer.mlp = other.mlp
    moeforge.build(wanted, tmp_path / "narrow")
    assert worst(tmp_path / "narrow", logits(mixed)) < 1e-4


def test_two_different_experts_are_mixed_by_the_router(llamas, tmp_path):
    """The mixture of two experts, computed here from the dense MLPs and the router weights."""
    base, one, two = llamas
    moeforge.build(recipe(base, one, two), tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")
    parts = [dense(one), dense(two)]

    class Mixed(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.mlps = torch.nn.ModuleList(part.model.layers[layer].mlp for part in parts)
            self.gate = made[f"model.layers.{layer}.block_sparse_moe.gate.weight"]

        def forward(self, x):
            shares = (x @ self.gate.T).softmax(-1)
            return sum(shares[..., i : i + 1] * mlp(x) for i, mlp in enumerate(self.mlps))

    mixed = dense(base)
    for layer in range(4):
        mixed.model.layers[layer].mlp = Mixed(layer)
    expected = logits(mixed)
    assert worst(tmp_path / "out", expected) < 1e-4
    assert (expected - logits(dense(base))).abs().max() > 0.1, "the experts matter"

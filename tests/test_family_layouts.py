"""Layouts of families: different experts in them, shared experts, and keys that must matter.

Different experts are compared with a mixture computed here from the dense models' own modules; its
router sees what the dense MLP sees.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import edit_config
from transformers import AutoModelForCausalLM
from zoo import ZOO

import moeforge
from moeforge import families
from moeforge.proof.heldout import load_output

IDS = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(0))
MULTIPLIERS = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}
NO_WINDOW = {"sliding_window": None}
PLAIN_QWEN2 = {"use_sliding_window": False}
MLPS = {"granitemoehybrid": "shared_mlp"}
"""Where a dense layer's MLP is, if it is not `mlp`."""

CASES = [
    ("mixtral", "arcee", {}),
    ("mixtral", "ernie4_5", {}),
    ("mixtral", "gemma", {}),
    ("mixtral", "granite", MULTIPLIERS),
    ("mixtral", "phi3", {}),
    ("granitemoe", "gemma", {"attention_bias": True}),
    ("granitemoe", "hyperclovax", {"use_post_norm": False, **MULTIPLIERS}),
    ("granitemoe", "seed_oss", {}),
    ("granitemoehybrid", "granitemoehybrid", MULTIPLIERS),
    ("granitemoe_swa", "granite_swa", MULTIPLIERS),
    ("granitemoe_swa", "smollm3", {}),
]
SHARED = [
    ("granitemoeshared", "gemma", {}),
    ("granitemoeshared", "granite", MULTIPLIERS),
    ("granitemoeshared", "hyperclovax", {"use_post_norm": False, **MULTIPLIERS}),
    ("granitemoeshared", "llama", {"attention_bias": True}),
    ("granitemoeshared", "mistral", NO_WINDOW),
    ("granitemoeshared", "qwen2", PLAIN_QWEN2),
    ("granitemoeshared", "seed_oss", {}),
    ("granitemoehybrid", "granitemoehybrid", MULTIPLIERS),
    ("granitemoe_swa", "granite_swa", MULTIPLIERS),
    ("granitemoe_swa", "smollm3", {}),
    ("qwen2_moe", "llama", {}),
    ("qwen2_moe", "mistral", NO_WINDOW),
]
WRONG = [
    ("mixtral", "ernie4_5", {}, {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}}),
    ("mixtral", "gemma", {}, {"hidden_act": "silu"}),
    ("mixtral", "arcee", {}, {"hidden_act": "silu"}),
    ("granitemoe", "granite", MULTIPLIERS, {"attention_multiplier": 0.25}),
    ("granitemoe", "hyperclovax", {"use_post_norm": False, **MULTIPLIERS}, {"logits_scaling": 2.0}),
    ("granitemoeshared", "llama", {}, {"attention_multiplier": 1.0}),
    ("granitemoehybrid", "granitemoehybrid", MULTIPLIERS, {"residual_multiplier": 1.0}),
    ("granitemoe_swa", "granite_swa", MULTIPLIERS, {"sliding_window": 4}),
    ("granitemoe_swa", "smollm3", {}, {"layer_rope_theta": [2e6] * 4}),
]


def case_id(value):
    return value if isinstance(value, str) else ""


def folders(models, dense, variant, count):
    shape = {**ZOO[dense], **variant}
    return [models(dense, seed=seed, with_tokenizer=False, **shape) for seed in range(1, count + 1)]


def logits(model):
    with torch.no_grad():
        return model.float().eval()(input_ids=IDS, use_cache=False).logits


def dense_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def recipe(family, base, experts, shared=(), **changes):
    wanted = {
        "base_model": str(base),
        "experts": experts,
        "gate_mode": "random",
        "architecture": family,
        **changes,
    }
    return {**wanted, "shared_experts": list(shared)} if shared else wanted


def part(folder, scale=1.0):
    return {"source_model": str(folder), "residual_scale": scale}


class Weighed(torch.nn.Module):
    """The sum of MLPs, each times what `weights` says of the input [..., hidden]."""

    def __init__(self, mlps, weights):
        super().__init__()
        self.mlps = torch.nn.ModuleList(mlps)
        self.weights = weights

    def forward(self, x):
        shares = self.weights(x)
        return sum(shares[..., i : i + 1] * mlp(x) for i, mlp in enumerate(self.mlps))


def with_mlps(base, parts, weights):
    """Logits of `base` whose MLPs are those of `parts`, weighed by weights(layer)."""
    model, others = dense_model(base), [dense_model(folder) for folder in parts]
    where = MLPS.get(model.config.model_type, "mlp")
    for number, layer in enumerate(model.model.layers):
        mlps = [getattr(other.model.layers[number], where) for other in others]
        setattr(layer, where, Weighed(mlps, weights(number)))
    return logits(model)


@pytest.mark.parametrize(("family", "dense", "variant"), CASES, ids=case_id)
def test_two_different_experts_are_mixed_by_the_router(family, dense, variant, models, tmp_path):
    base, one, two = folders(models, dense, variant, 3)
    moeforge.build(recipe(family, base, [part(one), part(two)]), tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")
    template = families.load(family).router

    def by_router(layer):
        gate = made[template.format(layer=layer)]
        return lambda x: (x @ gate.T).softmax(-1)

    expected = with_mlps(base, [one, two], by_router)
    assert (logits(load_output(tmp_path / "out")) - expected).abs().max() < 1e-4
    assert (expected - logits(dense_model(base))).abs().max() > 0.1, "the experts matter"


@pytest.mark.parametrize(("family", "dense", "variant"), SHARED, ids=case_id)
def test_shared_experts_are_added(family, dense, variant, models, tmp_path):
    base, other = folders(models, dense, variant, 2)
    halves = [part(base, 0.5)] * 2
    shared = [part(other, 0.5), part(base, 0.25)]
    moeforge.build(recipe(family, base, halves, shared), tmp_path / "out")
    expected = with_mlps(
        base,
        [base, other],
        lambda layer: lambda x: torch.tensor([0.75, 0.5]).expand(*x.shape[:-1], 2),
    )
    assert (logits(load_output(tmp_path / "out")) - expected).abs().max() < 1e-4
    assert (expected - logits(dense_model(base))).abs().max() > 0.1, "the shared expert matters"


@pytest.mark.parametrize(("family", "dense", "variant", "wrong"), WRONG, ids=case_id)
def test_keys_of_the_config_matter(family, dense, variant, wrong, models, tmp_path):
    """What the comparisons above would say of a key that is not what it has to be."""
    (base,) = folders(models, dense, variant, 1)
    moeforge.build(recipe(family, base, [part(base)] * 2), tmp_path / "out")
    expected = logits(dense_model(base))
    assert (logits(load_output(tmp_path / "out")) - expected).abs().max() < 1e-4
    edit_config(tmp_path / "out", **wrong)
    assert (logits(load_output(tmp_path / "out")) - expected).abs().max() > 1e-2


# --- limits --------------------------------------------------------------------------------------


def said_of(family, base):
    plan = moeforge.plan(recipe(family, base, [part(base)] * 2))
    return "\n".join(note.what for note in plan.notes)


def test_ministral3_is_exact_up_to_its_first_context_and_says_so(models, tmp_path):
    scaled = {
        "rope_type": "yarn",
        "rope_theta": 1e5,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "llama_4_scaling_beta": 0.5,
    }
    (base,) = folders(models, "ministral3", {"rope_parameters": scaled}, 1)
    assert "exact for the first 32 tokens" in said_of("mixtral", base)
    moeforge.build(recipe("mixtral", base, [part(base)] * 2), tmp_path / "out")
    off = (logits(load_output(tmp_path / "out")) - logits(dense_model(base))).abs()
    assert off[:, :32].max() < 1e-4
    assert off[:, 32:].max() > 1e-2
    (base,) = folders(
        models, "ministral3", {"rope_parameters": {**scaled, "llama_4_scaling_beta": 0.0}}, 1
    )
    assert "exact for" not in said_of("mixtral", base)


@pytest.mark.parametrize(
    ("family", "dense", "variant", "said"),
    [
        ("granitemoe", "llama", {"head_dim": 32}, "head_dim is 32, hidden_size / num_attention"),
        ("granitemoe", "gemma", {}, "1 is added to the weights of all norms; in bfloat16"),
        ("mixtral", "granite", MULTIPLIERS, "the multipliers of Granite are part of its weights"),
        ("mixtral", "arcee", {}, "half as large again"),
        ("mixtral", "gemma", {}, "other engines compute Mixtral with SiLU"),
        ("granitemoe", "llama", {"attention_bias": True}, "vLLM leaves the attention biases"),
    ],
    ids=case_id,
)
def test_what_should_be_known_of_a_home_is_said(family, dense, variant, said, models):
    (base,) = folders(models, dense, variant, 1)
    assert said in said_of(family, base)


@pytest.mark.parametrize(
    ("dense", "variant", "home"),
    [
        ("granite", MULTIPLIERS, "granitemoe"),
        ("granite", {"attention_bias": True}, "remote"),
        ("gemma", {}, "remote"),
        ("arcee", {}, "remote"),
        ("smollm3", {}, "remote"),
        ("granite_swa", {"attention_bias": True}, "granitemoe_swa"),
        ("hyperclovax", {"use_post_norm": False}, "granitemoe"),
        ("seed_oss", {"attention_bias": False}, "granitemoe"),
    ],
    ids=case_id,
)
def test_auto_takes_no_home_that_other_engines_get_wrong(dense, variant, home, models):
    (base,) = folders(models, dense, variant, 1)
    assert moeforge.plan(recipe("auto", base, [part(base)] * 2)).experts.family == home


# --- recipes written for mergekit-moe ------------------------------------------------------------


@pytest.mark.parametrize("dense", ["llama", "mistral"])
def test_mergekits_deepseek_form_builds(dense, models, tmp_path):
    """One shared expert without prompts; the code of that architecture is not in transformers."""
    base, one, two = (models(dense, seed=seed, sliding_window=None) for seed in (1, 2, 3))
    prompts = [["def f(x):", "import os"], ["Guten Tag"]]
    wanted = {
        "base_model": str(base),
        "architecture": "deepseek",
        "gate_mode": "hidden",
        "dtype": "bfloat16",
        "experts": [
            {"source_model": str(folder), "positive_prompts": texts}
            for folder, texts in zip((one, two), prompts, strict=True)
        ],
        "shared_experts": [{"source_model": str(base), "residual_scale": 0.1}],
    }
    moeforge.build(wanted, tmp_path / "out")
    assert type(load_output(tmp_path / "out")).__name__ == "GraniteMoeSharedForCausalLM"
    made = load_file(tmp_path / "out" / "model.safetensors")
    shared = made["model.layers.2.shared_mlp.output_linear.weight"]
    theirs = load_file(base / "model.safetensors")["model.layers.2.mlp.down_proj.weight"]
    assert torch.equal(shared, (0.1 * theirs).bfloat16())


def test_the_deepseek_form_of_a_model_with_windows_names_the_way_out(models):
    base, one, two = (models("mistral", seed=seed, sliding_window=8) for seed in (1, 2, 3))
    wanted = recipe("deepseek", base, [part(one), part(two)], [part(base)])
    report = moeforge.check(wanted)
    said = f"{report.errors[0].what}\n{report.errors[0].fix}"
    assert "no sliding attention (sliding_window is 8)" in said
    assert "architecture: auto" in said
    assert moeforge.plan({**wanted, "architecture": "auto"}).experts.family == "qwen2_moe"


@pytest.mark.parametrize("dense", ["llama", "mistral", "qwen2"])
def test_mergekits_qwen_form_builds(dense, models, tmp_path):
    """Exactly one shared expert, with prompts; models without biases get zeros."""
    variant = {"sliding_window": None} if dense == "mistral" else {}
    base, one, two = (models(dense, seed=seed, **variant) for seed in (1, 2, 3))
    prompts = [["def f(x):", "import os"], ["Guten Tag"], ["hello"]]
    entries = [
        {"source_model": str(folder), "positive_prompts": texts}
        for folder, texts in zip((one, two, base), prompts, strict=True)
    ]
    wanted = {
        "base_model": str(base),
        "architecture": "qwen",
        "gate_mode": "hidden",
        "experts": entries[:2],
        "shared_experts": entries[2:],
    }
    moeforge.build(wanted, tmp_path / "out")
    assert type(load_output(tmp_path / "out")).__name__ == "Qwen2MoeForCausalLM"
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert made["model.layers.0.mlp.shared_expert_gate.weight"].abs().max() > 0
    bias = made["model.layers.0.self_attn.k_proj.bias"]
    assert bool(bias.any()) is (dense == "qwen2")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["shared_expert_intermediate_size"] == 96

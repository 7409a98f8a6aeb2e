"""LoRA adapters: what peft's merge_and_unload() makes of them, or a refusal by name."""

import json
import shutil
import subprocess
import sys
import warnings

import pytest
import tiny
import torch
from hub_server import HubServer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import moeforge
from moeforge import engine
from moeforge.engine.lora import adapted_rows
from moeforge.errors import SourceError
from moeforge.output.layout import lay_out
from moeforge.planners.adapters import apply_adapter
from moeforge.planners.model import HEAD, Findings, from_source
from moeforge.plans import Lora, Merge, Plan, Read, walk
from moeforge.sources import open_source
from moeforge.sources.adapter import open_adapter

EMBEDDINGS = "model.embed_tokens.weight"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q = "model.layers.0.self_attn.q_proj"
A, B = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"
P = "base_model.model."
SMALL = {"num_hidden_layers": 2}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4}


def load(folder, rows=None):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def train(base, folder, rows=None, **config):
    """Save an adapter of `base` with random values in everything that can be trained."""
    config = {"r": 4, "target_modules": ["q_proj"], **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load(base, rows), LoraConfig(**config))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder)
    return folder


def merged(base, adapter, rows=None):
    """The model that peft makes of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(load(base, rows), adapter).merge_and_unload()


def apply(base, adapter):
    findings = Findings()
    model = from_source(open_source(str(base)))
    return apply_adapter(model, open_adapter(str(adapter)), findings, ("model",)), findings


def planned(base, adapter):
    model, findings = apply(base, adapter)
    assert not findings, findings
    assert model is not None
    return model


def refusal(base, adapter):
    model, findings = apply(base, adapter)
    assert model is None
    assert all(finding.path == ("model",) and finding.fix for finding in findings)
    return "\n".join(map(str, findings))


def evaluate(expr, sources):
    """What an expression stands for, in float32; adapted matrices in blocks of seven rows."""
    if isinstance(expr, Read):
        spec = sources[expr.source].specs()[expr.name]
        raw = bytearray(spec.nbytes)
        sources[expr.source].read(expr.name, 0, memoryview(raw))
        dtype = getattr(torch, spec.dtype.name)
        return torch.frombuffer(raw, dtype=dtype).reshape(spec.shape).float()
    if isinstance(expr, Merge):
        weights = dict(expr.params)["weight"]
        parts = zip(weights, expr.inputs, strict=True)
        return sum(weight * evaluate(part, sources) for weight, part in parts)
    assert isinstance(expr, Lora)
    weight, a, b = (evaluate(part, sources) for part in (expr.weight, expr.a, expr.b))
    lengths = evaluate(expr.magnitude, sources) if expr.magnitude else None
    starts = range(0, len(weight), 7)
    blocks = [adapted_rows(expr, weight[i : i + 7].clone(), i, a, b, lengths) for i in starts]
    return torch.cat(blocks)


def assert_like_peft(base, adapter, rows=None):
    """Compare every tensor, and what the config says of head and vocabulary; return both models."""
    ours, theirs = planned(base, adapter), merged(base, adapter, rows)
    expected = theirs.state_dict()
    if theirs.config.tie_word_embeddings:
        del expected[HEAD]
    assert set(ours.tensors) == set(expected)
    for name, tensor in ours.tensors.items():
        value = evaluate(tensor.expr, ours.sources)
        assert tensor.spec.shape == expected[name].shape
        error = (value - expected[name]).abs().max() / expected[name].abs().max()
        assert error <= 1e-6, name
    assert ours.config.get("tie_word_embeddings", HEAD not in ours.tensors) == (
        HEAD not in ours.tensors
    )
    assert ours.config["vocab_size"] == theirs.config.vocab_size
    return ours, theirs


# --- what peft makes of it -----------------------------------------------------------------------

LLAMA = {
    "all layers": {"target_modules": ALL},
    "alpha": {"lora_alpha": 3},
    "rank-stabilised": {"lora_alpha": 16, "use_rslora": True, "r": 9},
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {"layers.1.mlp.up_proj": 2, "v_proj": 3, r"model\.layers\.\d\.mlp.*": 5},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 7, "down_proj": 1, "proj": 50},
    },
    "DoRA": {"target_modules": ALL, "use_dora": True},
    "DoRA of the head": {"target_modules": ["lm_head"], "use_dora": True},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "saved modules": {"modules_to_save": ["embed_tokens", "lm_head", "norm", "down_proj"]},
    "orthogonal start": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("kind", LLAMA)
def test_llama(kind, models, tmp_path):
    base = models("llama", seed=1, **SMALL)
    adapter = train(base, tmp_path / "adapter", **LLAMA[kind])
    ours, _ = assert_like_peft(base, adapter)
    changed = [t for t in ours.tensors.values() if not isinstance(t.expr, Read)]
    assert changed


BIASES = {
    "none": {},
    "all": {"bias": "all"},
    "of adapted modules": {"bias": "lora_only"},
    "of B": {"lora_bias": True, "lora_alpha": 12},
    "of B, over all": {"lora_bias": True, "bias": "all"},
}


@pytest.mark.parametrize("kind", BIASES)
def test_biases(kind, models, tmp_path):
    base = models("qwen2", seed=1, **SMALL)
    assert_like_peft(base, train(base, tmp_path / "adapter", **BIASES[kind]))


CONV1D = {
    "all": {"target_modules": ["c_attn", "c_proj", "c_fc"]},
    "the square one": {"target_modules": ["attn.c_proj"]},
    # peft notes the orientation of the module that came last: the head is a plain matrix
    "with the head": {"target_modules": ["attn.c_proj", "lm_head"]},
    "with embeddings": {"target_modules": ["c_attn", "wte", "wpe"]},
    "biases": {"target_modules": ["c_attn"], "bias": "all"},
}


@pytest.mark.parametrize("kind", CONV1D)
def test_gpt2_stores_matrices_the_other_way_round(kind, models, tmp_path):
    base = models("gpt2", seed=1, **GPT2)
    assert_like_peft(base, train(base, tmp_path / "adapter", **CONV1D[kind]))


def test_bfloat16_is_computed_in_float32(models, tmp_path):
    base = models("llama", seed=2, dtype=torch.bfloat16, **SMALL)
    adapter = train(base, tmp_path / "adapter", target_modules=ALL, use_dora=True)
    ours, _ = assert_like_peft(base, adapter)
    assert {t.spec.dtype.name for t in ours.tensors.values()} == {"bfloat16"}


WRITTEN = {
    "tied, DoRA": ("llama", {"target_modules": [*ALL, "lm_head"], "use_dora": True}),
    "tied, twice": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "biases": ("qwen2", {"lora_bias": True, "bias": "all", "modules_to_save": ["norm"]}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", WRITTEN)
def test_the_engine_writes_what_peft_makes(kind, dtype, models, tmp_path):
    model_type, config = WRITTEN[kind]
    base = models(model_type, seed=2, dtype=dtype, tie_word_embeddings=True, **SMALL)
    adapter = train(base, tmp_path / "adapter", **config)
    model = planned(base, adapter)
    tensors = tuple(model.tensors.values())
    plan = Plan("merge", tensors, model.config, model.sources, model.donor)
    engine.run(plan, lay_out(tensors), tmp_path, engine.Settings(threads=2))
    written = load_file(tmp_path / "model.safetensors")
    expected = merged(base, adapter).state_dict()
    assert set(written) == set(model.tensors)
    for name, tensor in written.items():
        assert tensor.dtype == dtype
        # half a unit in the last place, and what float32 leaves open
        bound = (
            expected[name].abs() * torch.finfo(dtype).eps / 2 + 1e-6 * expected[name].abs().max()
        )
        assert ((tensor.float() - expected[name]).abs() <= bound).all(), name


def test_float64_is_computed_in_float64():
    generator = torch.Generator().manual_seed(0)
    w, a, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((5, 6), (2, 6), (9, 2))
    )
    node = Lora(Read("m", "w"), Read("l", "a"), Read("l", "b"), 0.3)
    rows = adapted_rows(node, w.clone(), 4, a, b, None)
    assert torch.allclose(rows, w + 0.3 * (b @ a)[4:], rtol=1e-14, atol=0)


NEOX = {
    "adapted": {"target_modules": ["query_key_value", "embed_in", "lm_head"]},
    "saved": {"target_modules": ["dense"], "modules_to_save": ["embed_in", "lm_head"]},
}


@pytest.mark.parametrize("kind", NEOX)
@pytest.mark.parametrize("rows", [None, 310])
def test_a_head_that_its_file_calls_otherwise(kind, rows, models, tmp_path):
    base = models("gpt_neox", seed=1, **SMALL)
    adapter = train(base, tmp_path / "adapter", rows, **NEOX[kind])
    ours, theirs = planned(base, adapter), merged(base, adapter, rows)
    head = evaluate(ours.tensors["embed_out.weight"].expr, ours.sources)
    assert torch.allclose(head, theirs.lm_head.weight, atol=1e-6)
    assert ours.config["vocab_size"] == (rows or tiny.VOCABULARY)


# --- in recipes ----------------------------------------------------------------------------------


def average(*models, **changes):
    inputs = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
    return {"merge_method": "linear", "models": inputs, **changes}


def build(recipe, out):
    moeforge.build(recipe, out)
    return load_file(out / "model.safetensors")


def assert_close(value, expected):
    assert (value.float() - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_an_input_of_a_merge(models, tmp_path):
    base, other = models("llama", seed=1, **SMALL), models("llama", seed=2, **SMALL)
    adapter = train(base, tmp_path / "adapter", target_modules=ALL)
    written = build(average(f"{base}+{adapter}", str(other)), tmp_path / "out")
    one, two = merged(base, adapter).state_dict(), load(other).state_dict()
    for name, value in written.items():
        assert_close(value, (one[name] + two[name]) / 2)


def test_an_adapted_inline_recipe(models, tmp_path):
    base, other = models("llama", seed=1, **SMALL), models("llama", seed=2, **SMALL)
    adapter = train(base, tmp_path / "adapter", use_dora=True)
    inner = average(str(base), str(other))
    entry = {"model": inner, "lora": str(adapter)}
    out = build({"merge_method": "passthrough", "models": [{"model": entry}]}, tmp_path / "out")
    build(inner, tmp_path / "inner")
    for name, value in merged(tmp_path / "inner", adapter).state_dict().items():
        assert_close(out[name], value)


def test_the_result_is_a_model_with_the_adapters_vocabulary(models, tmp_path):
    base = models("llama", seed=1, tie_word_embeddings=True, **SMALL)
    rows = tiny.VOCABULARY + 5
    adapter = train(base, tmp_path / "adapter", rows, modules_to_save=["lm_head"])
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(adapter)
    build(
        {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]}, tmp_path / "o"
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "o").tokenize("<new>") == ["<new>"]
    ids = torch.tensor([[256, 5, 7, rows - 1]])
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "o")(ids).logits
        theirs = merged(base, adapter, rows)(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_experts_and_the_base_that_makes_their_gates(models, tmp_path):
    base = models("llama", seed=1, **SMALL)
    adapter = train(base, tmp_path / "adapter", target_modules=ALL)
    whole = tmp_path / "whole"
    merged(base, adapter).save_pretrained(whole)
    tiny.tokenizer().save_pretrained(whole)

    def mixture(first, out):
        experts = [
            {"source_model": first, "positive_prompts": ["one thing"]},
            {"source_model": str(base), "positive_prompts": ["another"]},
        ]
        recipe = {"base_model": first, "gate_mode": "hidden", "dtype": "float32"}
        return build({**recipe, "experts": experts}, out)

    adapted = mixture(f"{base}+{adapter}", tmp_path / "adapted")
    expected = mixture(str(whole), tmp_path / "expected")
    assert set(adapted) == set(expected)
    for name, value in adapted.items():
        assert torch.allclose(value, expected[name], atol=1e-5), name


def test_what_is_wrong_with_an_adapter_is_said_at_its_place(models, tmp_path):
    base = models("llama", seed=1, **SMALL)
    adapter = train(base, tmp_path / "adapter")
    edit_tensors(adapter, **{f"{P}score.weight": torch.ones(2, 64)})
    report = moeforge.check(average(str(base), f"{base}+{adapter}"))
    assert report.exit_code == 4
    assert [finding.path for finding in report.errors] == [("models", 1, "model")]
    assert "score.weight" in report.errors[0].what
    report = moeforge.check(average(f"{base}+./nowhere", str(base)))
    assert report.exit_code == 3
    assert "adapter ./nowhere does not exist" in report.errors[0].what


# --- tied heads ----------------------------------------------------------------------------------

TIED = {
    "embeddings": ({"target_modules": ["embed_tokens"]}, True),
    "head": ({"target_modules": ["lm_head"]}, True),
    "both": ({"target_modules": ["embed_tokens", "lm_head"]}, True),
    "both, kept tied": ({"target_modules": ["lm_head"], "ensure_weight_tying": True}, True),
    "saved embeddings": ({"modules_to_save": ["embed_tokens"]}, False),
    "saved head": ({"modules_to_save": ["lm_head"]}, False),
    "both saved": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "saved and kept tied": (
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
}


@pytest.mark.parametrize("kind", TIED)
def test_tied_heads(kind, models, tmp_path):
    base = models("llama", seed=4, tie_word_embeddings=True, **SMALL)
    config, stays = TIED[kind]
    ours, _ = assert_like_peft(base, train(base, tmp_path / "adapter", **config))
    assert (HEAD not in ours.tensors) == stays


def test_two_matrices_for_a_tied_one_are_refused(models, tmp_path):
    base = models("llama", seed=4, tie_word_embeddings=True, **SMALL)
    adapter = train(base, tmp_path / "adapter", target_modules=["embed_tokens", "lm_head"])
    edit_tensors(adapter, **{f"{P}lm_head.base_layer.weight": torch.ones(tiny.VOCABULARY, 64)})
    said = refusal(base, adapter)
    assert "embed_tokens.base_layer.weight differ" in said
    assert f"but {base} ties them" in said


def test_gpt2_is_untied(models, tmp_path):
    base = models("gpt2", seed=1, **GPT2)
    adapter = train(base, tmp_path / "a", target_modules=["c_attn"], modules_to_save=["lm_head"])
    ours, _ = assert_like_peft(base, adapter)
    assert HEAD in ours.tensors
    assert ours.config["tie_word_embeddings"] is False


# --- another vocabulary --------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [tiny.VOCABULARY + 5, tiny.VOCABULARY - 30])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
    ],
    ids=["resized", "saved", "embeddings saved", "head saved", "adapted"],
)
def test_a_resized_vocabulary(config, tied, rows, models, tmp_path):
    base = models("llama", seed=5, tie_word_embeddings=tied, **SMALL)
    adapter = train(base, tmp_path / "adapter", rows, **config)
    ours, _ = assert_like_peft(base, adapter, rows)
    assert ours.config["vocab_size"] == rows
    assert ours.donor.key == str(base)
    tiny.tokenizer().save_pretrained(adapter)
    assert planned(base, adapter).donor.key == str(adapter)


def test_the_adapters_tokenizer_replaces_that_of_an_inline_recipe(models, tmp_path):
    base = models("llama", seed=5, **SMALL)
    adapter = train(base, tmp_path / "adapter", tiny.VOCABULARY + 5)
    tiny.tokenizer().save_pretrained(adapter)
    other = models("llama", seed=6, **SMALL)
    inner = average(str(base), str(other), chat_template="chatml")
    entry = {"merge_method": "passthrough", "models": [{"model": inner}]}
    assert moeforge.plan(entry).tokenizer is not None
    entry["models"][0]["model"] = {"model": inner, "lora": str(adapter)}
    plan = moeforge.plan(entry)
    assert plan.tokenizer is None
    assert plan.donor.key == str(adapter)


def test_the_models_tokenizer_stays_where_the_vocabulary_does(models, tmp_path):
    base = models("llama", seed=5, **SMALL)
    adapter = train(base, tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(adapter)
    assert planned(base, adapter).donor.key == str(base)


def test_a_head_that_stays_behind_is_refused(models, tmp_path):
    base = models("llama", seed=5, **SMALL)
    adapter = train(base, tmp_path / "adapter", tiny.VOCABULARY + 5)
    edit_tensors(adapter, **{f"base_model.model.{HEAD}": None})
    said = refusal(base, adapter)
    assert "model.embed_tokens.weight would have 305, lm_head.weight would have 300 rows" in said


# --- other names ---------------------------------------------------------------------------------


def rename(folder, old, new):
    """Put another prefix before the names of a checkpoint."""
    file = folder / "model.safetensors"
    tensors = {name.replace(old, new, 1): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


PREFIXES = {
    "inside another": ("", "language_model."),
    "without its own": ("model.", ""),
    "another's": ("model.", "model.language_model."),
}


@pytest.mark.parametrize("kind", PREFIXES)
def test_other_prefixes(kind, models, tmp_path):
    base = models("llama", seed=6, **SMALL)
    config = {"target_modules": [*ALL, "embed_tokens", "lm_head"], "modules_to_save": ["norm"]}
    adapter = train(base, tmp_path / "adapter", **config)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    rename(other, *PREFIXES[kind])
    before, after = planned(base, adapter), planned(other, adapter)
    for name, tensor in before.tensors.items():
        twin = after.tensors[name.replace(*PREFIXES[kind], 1)]
        assert torch.equal(
            evaluate(tensor.expr, before.sources), evaluate(twin.expr, after.sources)
        )


def test_a_vision_tower_with_layers_of_the_same_names(models, tmp_path):
    base = models("llama", seed=6, **SMALL)
    adapter = train(base, tmp_path / "adapter")
    other = tmp_path / "other"
    shutil.copytree(base, other)
    rename(other, "model.", "text.")
    rest = Q.removeprefix("model.")
    for layer, size in ((0, 48), (1, 48)):
        name = f"vision.{rest.replace('0', str(layer))}.weight"
        edit_tensors(other, "model.safetensors", **{name: torch.zeros(size, size)})
    changed = [
        n for n, t in planned(other, adapter).tensors.items() if not isinstance(t.expr, Read)
    ]
    assert changed == [f"text.{rest}.weight", f"text.{rest.replace('0', '1')}.weight"]


# --- refusals ------------------------------------------------------------------------------------


def edit_tensors(folder, file="adapter_model.safetensors", **changes):
    """Add tensors, or remove those that are None."""
    tensors = load_file(folder / file)
    for name, tensor in changes.items():
        tensors.pop(name) if tensor is None else tensors.update({name: tensor})
    save_file(tensors, folder / file, metadata={"format": "pt"})


def edit_settings(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def fine(models, tmp_path):
    """A base and an adapter with nothing wrong, to damage."""
    base = models("llama", seed=7, **SMALL)
    return base, train(base, tmp_path / "adapter")


UNUSED = {
    "another model's layer": {f"{P}model.layers.9.self_attn.q_proj.lora_A.weight": (4, 64)},
    "a classifier": {f"{P}score.weight": (2, 64)},
    "a layer that is missing in part": {
        f"{P}model.layers.0.self_attn.g_proj.lora_B.weight": (9, 4)
    },
    "several adapters": {f"{P}{Q}.lora_A.other.weight": (4, 64)},
    "half a pair": {f"{P}model.layers.0.self_attn.k_proj.lora_A.weight": (4, 64)},
    "a bias of B where there is none": {f"{P}{Q}.lora_B.bias": (64,)},
    "a length that nobody asked for": {f"{P}{Q}.lora_magnitude_vector": (64,)},
    "a diagonal": {f"{P}{Q}.lora_diag": (4,)},
}


@pytest.mark.parametrize("kind", UNUSED)
def test_every_tensor_is_used_or_named(kind, fine):
    edit_tensors(fine[1], **{name: torch.ones(shape) for name, shape in UNUSED[kind].items()})
    said = refusal(*fine)
    assert all(
        name.removeprefix(P).removesuffix(".lora_magnitude_vector") in said for name in UNUSED[kind]
    )


SHAPES = {
    "rank": ({A: (3, 64), B: (64, 3)}, "[3, 64] and B [64, 3], of rank 4"),
    "inputs": ({A: (4, 60)}, "[4, 60]"),
    "outputs": ({B: (60, 4)}, "[60, 4]"),
    "a convolution": ({A: (4, 64, 1, 1), B: (64, 4, 1, 1)}, "[4, 64, 1, 1]"),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_shapes_are_the_models(kind, fine):
    shapes, words = SHAPES[kind]
    edit_tensors(fine[1], **{name: torch.ones(shape) for name, shape in shapes.items()})
    said = refusal(*fine)
    assert words in said
    assert f"{Q}.weight of {fine[0]} is [64, 64]" in said


def test_a_stored_tensor_of_another_shape(models, tmp_path):
    base = models("llama", seed=7, **SMALL)
    adapter = train(base, tmp_path / "adapter", modules_to_save=["norm"])
    edit_tensors(adapter, **{f"{P}model.norm.weight": torch.ones(65)})
    said = refusal(base, adapter)
    assert "model.norm.weight is [65], model.norm.weight of" in said
    assert "is [64]" in said


SETTINGS = {
    "aLoRA": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens makes it something else"),
    "repeated layers": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, '"pissa_niter_4", which changed the model'),
    "OLoRA": ({"init_lora_weights": "olora"}, '"olora", which changed the model'),
    "no rank": ({"r": None}, "r is None"),
    "rank zero": ({"rank_pattern": {"q_proj": 0}}, "r is 0"),
    "alpha": ({"lora_alpha": "16"}, "lora_alpha is '16'"),
    "a list of patterns": ({"alpha_pattern": ["q"]}, "alpha_pattern is ['q']"),
    "a flag in a pattern": ({"rank_pattern": {"(?i)q": 1}}, "rank_pattern has '(?i)q'"),
    "no pattern": ({"alpha_pattern": {"(": 1}}, "alpha_pattern has '(', which is no pattern"),
    "no lengths": ({"use_dora": True}, f"use_dora is True, but {Q} has no lora_magnitude_vector"),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings(kind, fine):
    changes, words = SETTINGS[kind]
    edit_settings(fine[1], **changes)
    assert words in refusal(*fine)


def test_dora_of_columns_is_refused(models, tmp_path):
    base = models("llama", seed=7, **SMALL)
    adapter = train(base, tmp_path / "embed", target_modules=["embed_tokens"], use_dora=True)
    assert "embed_tokens.lora_magnitude_vector: DoRA on an embedding" in refusal(base, adapter)
    base = models("gpt2", seed=1, **GPT2)
    adapter = train(base, tmp_path / "conv", target_modules=["c_attn"], use_dora=True)
    assert "stored as [in, out]" in refusal(base, adapter)


def test_trainable_tokens_are_refused(models, tmp_path):
    base = models("llama", seed=7, **SMALL)
    adapter = train(base, tmp_path / "adapter", trainable_token_indices=[1, 2])
    assert "trainable tokens are not supported" in refusal(base, adapter)


def test_fused_experts_are_refused(models, tmp_path):
    shape = {"num_local_experts": 2, "num_experts_per_tok": 1}
    base = models("mixtral", seed=1, **SMALL, **shape)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = train(base, tmp_path / "adapter", target_modules=[], target_parameters=parameters)
    assert "target_parameters (fused experts) are not supported" in refusal(base, adapter)


# --- opening -------------------------------------------------------------------------------------


def test_an_adapter_is_found_beside_the_recipe_and_here(fine, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    found = open_adapter("adapter", beside=tmp_path)
    assert found.key == "adapter"
    assert found.folder == tmp_path / "adapter"
    assert set(found.specs()) == set(load_file(fine[1] / "adapter_model.safetensors"))
    span = found.locate(A)
    raw = bytearray(16)
    found.read(A, 4, memoryview(raw))
    assert span is not None
    assert span.path.read_bytes()[span.offset + 4 : span.offset + 20] == raw
    with pytest.raises(SourceError, match="is a local folder and has no revision v1"):
        open_adapter("adapter", "v1", beside=tmp_path)


def pickle(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def model_instead(folder):
    (folder / "adapter_config.json").rename(folder / "config.json")


UNUSABLE = {
    "pickled": (pickle, ["adapter_model.bin", "save_pretrained"]),
    "a model": (model_instead, ["is a model, not a LoRA adapter"]),
    "empty": (
        lambda folder: [f.unlink() for f in folder.iterdir()],
        ["has no adapter_config.json"],
    ),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        ["no adapter_model.safetensors", "Download it again"],
    ),
    "prefix tuning": (
        lambda folder: edit_settings(folder, peft_type="PREFIX_TUNING"),
        ["type PREFIX_TUNING, not LORA"],
    ),
    "config no JSON": (
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        ["adapter_config.json cannot be read"],
    ),
    "absent": (shutil.rmtree, ["does not exist", "not a Hub id"]),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_is_no_adapter_is_called_by_its_name(kind, fine):
    damage, words = UNUSABLE[kind]
    damage(fine[1])
    with pytest.raises(SourceError) as caught:
        open_adapter(str(fine[1]))
    assert str(fine[1]) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_misspelt_path_names_its_neighbour(fine, tmp_path):
    with pytest.raises(SourceError, match='has no adaptor — did you mean "adapter"'):
        open_adapter(f"{tmp_path.name}/adaptor", beside=tmp_path.parent, offline=True)


def test_an_adapter_named_as_a_model_of_the_recipe(fine):
    base, adapter = fine
    for file in adapter.iterdir():
        shutil.copy(file, base)
    try:
        assert "a model has the same name" in refusal(base, base)
    finally:
        for file in adapter.iterdir():
            (base / file.name).unlink()


def test_two_adapters_one_after_the_other(models, tmp_path):
    base = models("llama", seed=8, **SMALL)
    one, two = train(base, tmp_path / "one"), train(base, tmp_path / "two", lora_alpha=30)
    findings = Findings()
    first = planned(base, one)
    model = apply_adapter(first, open_adapter(str(two)), findings, ())
    assert not findings
    assert model.label == f"{base}+{one}+{two}"
    assert sum(isinstance(part, Lora) for part in walk(model.tensors[f"{Q}.weight"].expr)) == 2


CLIENT = """
import json, sys
from pathlib import Path
from moeforge.errors import MoeforgeError
from moeforge.sources.adapter import open_adapter
for name, revision, offline in json.loads(sys.argv[1]):
    try:
        found = open_adapter(name, revision, offline=offline)
        files = sorted(file.name for file in found.folder.iterdir())
        print(json.dumps([found.key, sorted(found.specs()), files]))
    except MoeforgeError as error:
        print(json.dumps([type(error).__name__, str(error), []]))
"""


def test_adapters_on_the_hub(fine, tmp_path):
    files = {file.name: file.read_bytes() for file in fine[1].iterdir()}
    config = {"adapter_config.json": files["adapter_config.json"]}
    calls = {
        "fetched": ("me/lora", None, False),
        "cached": ("me/lora", None, True),
        "pinned": ("me/lora", "v2", False),
        "pickled": ("me/pickled", None, False),
        "a model": ("me/model", None, False),
        "no such": ("me/nothing", None, False),
        "never fetched": ("me/other", None, True),
    }
    with HubServer() as hub:
        hub.add("me/lora", {**files, "checkpoint-1/adapter_model.safetensors": b"old"})
        hub.add("me/lora", {**files, "tokenizer.json": b"{}"}, branch="v2")
        hub.add("me/pickled", {**config, "adapter_model.bin": b"pickle"})
        hub.add("me/model", {"config.json": b"{}", "model.safetensors": b""})
        command = [sys.executable, "-W", "ignore", "-c", CLIENT, json.dumps(list(calls.values()))]
        env = hub.env(tmp_path / "home")
        run = subprocess.run(
            command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert not hub.asked("pickled.*[.]bin|model/.*model[.]safetensors|checkpoint-1")
    lines = run.stdout.splitlines()
    said = {kind: json.loads(line) for kind, line in zip(calls, lines, strict=True)}
    names = sorted(load_file(fine[1] / "adapter_model.safetensors"))
    assert said["fetched"][:2] == said["cached"][:2] == ["me/lora", names]
    assert said["pinned"][:2] == ["me/lora@v2", names]
    assert "tokenizer.json" in said["pinned"][2]
    words = {
        "pickled": ["SourceError", "me/pickled is pickled", "adapter_model.bin"],
        "a model": ["SourceError", "me/model is a model, not a LoRA adapter"],
        "no such": ["HubError", "adapter me/nothing: there is no such repository"],
        "never fetched": ["HubError", "adapter me/other", "offline mode is on"],
    }
    for kind, expected in words.items():
        for word in expected:
            assert word in " ".join(said[kind][:2]), kind

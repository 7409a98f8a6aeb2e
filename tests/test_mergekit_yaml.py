"""What mergekit-yaml accepts is a recipe here, and means the same.

Every spelling in these tables was given to mergekit-yaml 0.1.5, with models of the parity suite;
the meanings are what its outputs showed. Where they are sums, `expected` adds them up in float64.
"""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import edit_config

import moeforge
from moeforge import forge

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MLP, ATTENTION = "mlp.up_proj.weight", "self_attn.q_proj.weight"


def parsed(text, folders):
    """The recipe `text`, with A, B and C standing for models."""
    names = dict(zip("ABC", map(str, folders), strict=False))

    def filled(value):
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [filled(item) for item in value]
        return names.get(value, value) if isinstance(value, str) else value

    return filled(yaml.safe_load(text))


def tensor(plan, name):
    (found,) = (tensor for tensor in plan.tensors if tensor.name == name)
    return found


def params(plan, name):
    return dict(tensor(plan, name).expr.params)


PLAIN = """
merge_method: linear
models:
  - {model: A, parameters: {weight: 1}}
  - {model: B, parameters: {weight: 2}}
"""


def plain(folders):
    return forge.plan(parsed(PLAIN, folders))


# --- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reference",
    [
        "{model: A}",
        "{model: A, lora: null, override_architecture: null}",
        "{model: {path: A}}",
        "{model: {path: A, revision: null}, lora: null}",
        "{model: A, override_architecture: LlamaForCausalLM}",
    ],
)
def test_ways_to_name_a_model(reference, llamas):
    text = PLAIN.replace("model: A", f"model: {reference}")
    plan = forge.plan(parsed(text, llamas))
    assert plan.tensors == plain(llamas).tensors
    assert plan.config == plain(llamas).config


def test_override_architecture_is_written_if_the_model_is_the_donor(llamas):
    reference = "{model: A, override_architecture: MistralForCausalLM}"
    plan = forge.plan(parsed(PLAIN.replace("model: A", f"model: {reference}"), llamas))
    assert plan.config["architectures"] == ["MistralForCausalLM"]
    plan = forge.plan(parsed(PLAIN.replace("model: B", f"model: {reference}"), llamas))
    assert plan.config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("base", ["A", "{model: A}", "{model: {path: A}}"])
def test_a_base_is_the_listed_model_however_it_is_spelt(base, llamas):
    text = f"""
merge_method: task_arithmetic
base_model: {base}
models: [{{model: A}}, {{model: B, parameters: {{weight: 0.5}}}}]
"""
    merge = tensor(forge.plan(parsed(text, llamas)), HEAD).expr
    assert [part.source for part in merge.inputs] == [str(llamas[0]), str(llamas[1])]


def test_a_base_that_is_not_listed_is_one_more_input(llamas):
    text = f"{PLAIN}\nbase_model: C\nparameters: {{weight: 4}}\n"
    merge = tensor(forge.plan(parsed(text, llamas)), HEAD).expr
    assert [part.source for part in merge.inputs] == list(map(str, llamas))
    assert dict(merge.params)["weight"] == (1, 2, 4)


def test_a_slice_may_have_a_base_of_its_own(llamas):
    part = "sources: [{model: A, layer_range: [0, 2]}, {model: B, layer_range: [0, 2]}]"
    text = f"""
merge_method: slerp
base_model: A
parameters: {{t: 0.25}}
slices:
  - {{{part}}}
  - {{base_model: B, {part}}}
"""
    plan = forge.plan(parsed(text, llamas))
    firsts = [tensor(plan, f"model.layers.{i}.{MLP}").expr.inputs[0].source for i in range(4)]
    assert firsts == [str(llamas[0])] * 2 + [str(llamas[1])] * 2
    assert tensor(plan, EMBED).expr.inputs[0].source == str(llamas[0]), "as the first slice"
    assert tensor(plan, HEAD).expr.inputs[0].source == str(llamas[1]), "as the last slice"


# --- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        "slices: []",
        "slices: null\nmodules: {}",
        "modules: null",
        "base_model: null",
        "dtype: null\nout_dtype: null",
        "dtype: ''",
        "parameters: null",
        "parameters: {}",
        "parameters: {normalize: []}",
        "tokenizer: null\ntokenizer_source: null\nchat_template: null",
        "chat_template: ''",
        "parameters: {int8_mask: true, t: 0.5, density: [0, 1], max_iter: '7'}",
    ],
)
def test_keys_that_say_nothing(more, llamas):
    plan = forge.plan(parsed(f"{PLAIN}\n{more}\n", llamas))
    assert (plan.tensors, plan.config) == (plain(llamas).tensors, plain(llamas).config)


@pytest.mark.parametrize(
    "text",
    [
        "models: [{model: A, parameters: null}]",
        "models: [{model: A, parameters: {}}]",
        "slices: [{sources: [{model: A, layer_range: [0, 4], parameters: null}]}]",
        "{models: [], slices: [{sources: [{model: A, layer_range: [0, 4]}], parameters: null}]}",
        """
models: null
slices:
  - sources: [{model: A, layer_range: [0, 4]}]
    base_model: null
    parameters: {}
    residual_weight: '0.5'
""",
        "modules: {default: {models: [{model: A}], slices: null, parameters: null}}",
        "modules: {default: {models: [], slices: [{sources: [{model: A, layer_range: [0, 4]}]}]}}",
    ],
)
def test_ways_to_write_one_model(text, llamas, tmp_path):
    recipe = {"merge_method": "passthrough", **parsed(text, llamas)}
    moeforge.build(recipe, tmp_path / "out")
    result = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(llamas[0] / "model.safetensors")
    assert result.keys() == original.keys()
    assert all(result[name].equal(original[name]) for name in result)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 4


@pytest.mark.parametrize("start", ["1", "'1'", "1.0", "'1.0'", "' 1 '", "'+1'", "true"])
def test_ways_to_write_a_layer(start, llamas):
    text = f"slices: [{{sources: [{{model: A, layer_range: [{start}, 3]}}]}}]"
    plan = forge.plan(parsed(text, llamas))
    reads = [tensor(plan, f"model.layers.{i}.{MLP}").expr.name for i in range(2)]
    assert reads == [f"model.layers.{i}.{MLP}" for i in (1, 2)]


def test_aliases_and_merge_keys(llamas, tmp_path):
    """They are in the text, so the text is what is given."""
    text = """
merge_method: linear
models:
  - &first
    model: A
    parameters: &one {weight: 1}
  - {<<: *first, model: B, parameters: {<<: *one, weight: 2}}
"""
    for letter, folder in zip("AB", llamas, strict=False):
        text = text.replace(f"model: {letter}", f"model: {folder}")
    (tmp_path / "r.yml").write_text(text)
    assert forge.plan(tmp_path / "r.yml").tensors == plain(llamas).tensors


# --- values --------------------------------------------------------------------------------------

WEIGHTS = {
    "true": (1, 1, 1),
    "0": (0, 0, 0),
    "'1e-5'": (1e-5,) * 3,
    "1e-5": (1e-5,) * 3,
    "'  3 '": (3, 3, 3),
    "'1_000'": (1000, 1000, 1000),
    "[]": (7, 7, 7),
    "[5]": (5, 5, 5),
    "[1, 4]": (1, 4, 1),
    "['1', 4]": (1, 4, 1),
    "[true, 4]": (1, 4, 1),
    "{value: 2}": (2, 2, 2),
    "{value: []}": (7, 7, 7),
    "{value: [1, 4], filter: mlp}": (1, 4, 7),
    "[{filter: self_attn, value: 1}, {filter: '*', value: 2}, {value: 9}]": (2, 2, 2),
    "[{filter: '', value: '3'}]": (3, 3, 3),
    "[{value: 3, filter: null}]": (3, 3, 3),
    "[{filter: mlp, value: []}, {value: 3}]": (7, 7, 3),
    "[{filter: layers.3., value: 2}, {filter: mlp, value: [1, 4]}]": (1, 2, 7),
}
"""A weight as mergekit takes it: what it is for the first layer's MLP, the last's, and the head."""


@pytest.mark.parametrize("weight", WEIGHTS)
def test_ways_to_write_a_number(weight, llamas):
    text = f"{PLAIN.replace('weight: 1', f'weight: {weight}')}\nparameters: {{weight: 7}}\n"
    plan = forge.plan(parsed(text, llamas))
    names = (f"model.layers.0.{MLP}", f"model.layers.3.{MLP}", HEAD)
    assert tuple(params(plan, name)["weight"][0] for name in names) == WEIGHTS[weight]


@pytest.mark.parametrize(
    ("value", "first", "last"),
    [
        *[(word, True, True) for word in ("1", "1.0", "yes", "'yes'", "'TRUE'", "'on'", "'1'")],
        *[(word, False, False) for word in ("0", "'false'", "'no'", "'off'", "'f'", "'0'", "'n'")],
        ("[true, false]", True, False),
        ("[0, 1]", False, True),
        ("['true', 'no']", True, False),
    ],
)
def test_ways_to_say_yes_and_no(value, first, last, llamas):
    plan = forge.plan(parsed(f"{PLAIN}\nparameters: {{normalize: {value}}}\n", llamas))
    found = [params(plan, f"model.layers.{i}.{MLP}")["normalize"] for i in (0, 3)]
    assert found == [first, last]


@pytest.mark.parametrize("value", ["10", "'10'", "10.0", "[10, 10]", "{value: '10'}"])
def test_ways_to_write_a_whole_number(value, llamas):
    models = "models: [{model: A}, {model: B}]"
    text = f"merge_method: karcher\n{models}\nparameters: {{max_iter: {value}}}\n"
    assert params(forge.plan(parsed(text, llamas)), HEAD)["max_iter"] == 10


@pytest.mark.parametrize(
    ("keys", "stored"),
    [
        ("dtype: torch.bfloat16", torch.bfloat16),
        ("dtype: float16", torch.float16),
        ("dtype: torch.float64", torch.float64),
        ("dtype: bfloat16\nout_dtype: torch.float32", torch.float32),
        ("out_dtype: bfloat16", torch.bfloat16),
        ("", torch.float32),
    ],
)
def test_dtypes(keys, stored, llamas, tmp_path):
    moeforge.build(parsed(f"{PLAIN}\n{keys}\n", llamas), tmp_path / "out")
    result = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in result.values()} == {stored}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == str(stored).removeprefix("torch.")


def test_a_recipe_as_it_is_published(llamas, tmp_path):
    """The form of thousands of model cards: slices with ranges of the whole, gradients, a base."""
    text = """
slices:
  - sources:
      - {model: A, layer_range: [0, 4]}
      - {model: B, layer_range: [0, 4]}
merge_method: linear
base_model: B
parameters:
  weight:
    - {filter: self_attn, value: [0, 0.5, 0.3, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0]}
    - value: 0.5
  normalize: false
dtype: float32
"""
    moeforge.build(parsed(text, llamas), tmp_path / "out")
    result = load_file(tmp_path / "out" / "model.safetensors")
    inputs = [load_file(folder / "model.safetensors") for folder in llamas[:2]]
    values = {
        MLP: (1, 0.5, 0.7, 0),
        ATTENTION: (0, 0.5, 0.3, 1),
        "input_layernorm.weight": [0.5] * 4,
    }
    cases = {f"model.layers.{i}.{rest}": w for rest, ws in values.items() for i, w in enumerate(ws)}
    for name, weight in {**cases, EMBED: 0.5, HEAD: 0.5}.items():
        expected = weight * sum(tensors[name].double() for tensors in inputs)
        torch.testing.assert_close(result[name].double(), expected, rtol=1e-6, atol=1e-7)


def test_tokenizer_source_and_no_tokens(llamas):
    model = "{model: {path: B}}"
    short = forge.plan(parsed(f"{PLAIN}\ntokenizer_source: {model}\n", llamas))
    text = f"{PLAIN}\ntokenizer: {{source: {model}, tokens: null, pad_to_multiple_of: null}}\n"
    long = forge.plan(parsed(text, llamas))
    assert short.config == long.config
    assert short.config["vocab_size"] == 258, "the tokenizer's tokens; the models have 300 rows"
    assert short.tokenizer.tokens.folder == llamas[1]


# --- what is mixed -------------------------------------------------------------------------------


def marked(models, seed, **changes):
    """A llama whose config and tokenizer say which one they are."""
    folder = models.copy(
        models("llama", seed=seed), f"marked-{seed}-{len(list(models.root.iterdir()))}"
    )
    edit_config(folder, marker=seed, **changes)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**json.loads((folder / "tokenizer_config.json").read_text()), "marker": seed})
    )
    return folder


SLICES = """
slices:
  - {base_model: C, sources: [{model: A, layer_range: [0, 2]}]}
  - sources: [{model: B, layer_range: [2, 4]}]
"""


@pytest.mark.parametrize(
    ("text", "donor"),
    [
        (PLAIN, 1),
        (f"{PLAIN}\nbase_model: B", 2),
        (f"{PLAIN}\nbase_model: C\nparameters: {{weight: 1}}", 3),
        (SLICES, 1),
        (f"{SLICES}\nbase_model: B", 2),
        (f"{SLICES}\nbase_model: C", 3),
        (
            "merge_method: passthrough\nmodules: {default: {models: [{model: B}]}}",
            2,
        ),
        ("merge_method: passthrough\nbase_model: B\nmodules: {default: {models: [{model: B}]}}", 2),
    ],
)
def test_config_and_tokenizer_are_the_bases_or_the_firsts(text, donor, models, tmp_path):
    folders = [marked(models, seed) for seed in (1, 2, 3)]
    moeforge.build(parsed(text, folders), tmp_path / "out")
    for file in ("config.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "out" / file).read_text())["marker"] == donor


@pytest.mark.parametrize("base", ["A", "B"])
def test_a_tied_head_counts_as_one_among_others(base, models, tmp_path):
    """The result has a head of its own, and its config says so, whichever is the base."""
    tied = models("llama", seed=5, tie_word_embeddings=True)
    folders = [tied, models("llama", seed=1)]
    moeforge.build(parsed(f"{PLAIN}\nbase_model: {base}\n", folders), tmp_path / "out")
    a, b = (load_file(folder / "model.safetensors") for folder in folders)
    result = load_file(tmp_path / "out" / "model.safetensors")
    expected = (a[EMBED].double() + 2 * b[HEAD].double()) / 3
    torch.testing.assert_close(result[HEAD].double(), expected, rtol=1e-6, atol=1e-7)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_tied_heads_stay_tied(models):
    folders = [models("llama", seed=seed, tie_word_embeddings=True) for seed in (5, 6)]
    plan = forge.plan(parsed(PLAIN, folders))
    assert HEAD not in {tensor.name for tensor in plan.tensors}
    assert plan.config["tie_word_embeddings"] is True


def test_half_inputs_are_added_in_float32(models, tmp_path):
    """bfloat16 keeps 8 bits: sums that were rounded to it would be off by 2^-9."""
    folders = [models("llama", seed=seed, dtype=torch.bfloat16) for seed in (1, 2)]
    moeforge.build(parsed(f"{PLAIN}\ndtype: float32\n", folders), tmp_path / "out")
    a, b = (load_file(folder / "model.safetensors") for folder in folders)
    result = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in result.items():
        expected = (a[name].double() + 2 * b[name].double()) / 3
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("dtypes", "stored"),
    [
        ((torch.float32, torch.bfloat16), torch.float32),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.bfloat16, torch.float64), torch.float64),
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
    ],
)
def test_inputs_of_different_dtypes(dtypes, stored, models, tmp_path):
    """The result has the dtype that holds both without loss; sums are not rounded before."""
    folders = [models("llama", seed=i, dtype=dtype) for i, dtype in enumerate(dtypes, 1)]
    moeforge.build(parsed(PLAIN, folders), tmp_path / "out")
    a, b = (load_file(folder / "model.safetensors") for folder in folders)
    result = load_file(tmp_path / "out" / "model.safetensors")
    rounding = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 2**-8}[stored]
    for name, value in result.items():
        assert value.dtype == stored
        expected = (a[name].double() + 2 * b[name].double()) / 3
        torch.testing.assert_close(value.double(), expected, rtol=rounding, atol=rounding / 10)


def with_buffer(models, seed, values):
    folder = models.copy(models("llama", seed=seed), f"buffer-{seed}-{sum(values)}")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.position_ids"] = torch.tensor(values)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_integers_are_copied_whatever_the_dtype(models, tmp_path):
    folders = [with_buffer(models, seed, [0, 1, 2**40 + 1]) for seed in (1, 2)]
    moeforge.build(parsed(f"{PLAIN}\ndtype: float16\n", folders), tmp_path / "out")
    result = load_file(tmp_path / "out" / "model.safetensors")
    assert result["model.position_ids"].tolist() == [0, 1, 2**40 + 1]
    assert result["model.position_ids"].dtype == torch.int64
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float16"


def test_integers_that_differ_are_refused(models, tmp_path):
    folders = [with_buffer(models, 1, [0, 1]), with_buffer(models, 2, [0, 2])]
    with pytest.raises(moeforge.errors.BuildError, match=r"model\.position_ids"):
        moeforge.build(parsed(PLAIN, folders), tmp_path / "out")
    assert not (tmp_path / "out").exists()

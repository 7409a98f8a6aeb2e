"""Bad models and bad combinations: refused before any byte, in words, and nothing is left."""

import json
import os
import shutil
import struct

import pytest
import torch
import warm
from safetensors.torch import load_file, save_file
from tiny import LAYERS, VOCABULARY, edit_config

import moeforge
from moeforge.errors import BuildError, MoeforgeError, show_path
from moeforge.output.folder import has_tokenizer

WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


def mixture(base, *experts, prompts=None, **changes):
    entries = [{"source_model": str(folder)} for folder in experts]
    for entry, texts in zip(entries, prompts or [], strict=False):
        entry["positive_prompts"] = texts
    if prompts is None:
        changes.setdefault("gate_mode", "random")
    return {"base_model": str(base), "experts": entries, **changes}


def linear(*models, **changes):
    named = [model if isinstance(model, dict) else str(model) for model in models]
    inputs = [{"model": model, "parameters": {"weight": 1}} for model in named]
    return {"merge_method": "linear", "models": inputs, **changes}


def stack(*slices, **changes):
    entries = [{"sources": [{"model": str(m), "layer_range": list(r)}]} for m, r in slices]
    return {"slices": entries, **changes}


def refused(recipe, code):
    """What `check` says against a recipe: {path: what}; nothing may be said twice."""
    report = moeforge.check(recipe)
    assert report.exit_code == code, report.errors
    found = {show_path(f.path): f"{f.what}\n{f.fix}" for f in report.errors}
    assert len(found) == len(report.errors)
    return found


@pytest.fixture
def damaged(llamas, tmp_path):
    """A copy of a llama, to damage."""
    folder = tmp_path / "damaged"
    shutil.copytree(llamas[0], folder)
    return folder


def change_tensors(folder, **changes):
    """Add tensors to a checkpoint, or remove those that are None."""
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in changes.items():
        tensors.pop(name) if tensor is None else tensors.update({name: tensor})
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


# --- models that are none ------------------------------------------------------------------------


def only_files(folder, *keep):
    for file in folder.iterdir():
        if file.name not in keep:
            file.unlink()


def adapter(folder):
    only_files(folder)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")


def gguf(folder):
    only_files(folder)
    (folder / "model-q4_k_m.gguf").write_bytes(b"GGUF")


def pickled(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.pt")


UNUSABLE = {
    "an adapter": (adapter, ["is an adapter, not a model", 'Write "BASE+']),
    "GGUF": (gguf, ["GGUF", "original checkpoint"]),
    "pickled": (
        pickled,
        ["none of model.safetensors", "It has pytorch_model.pt", "save_pretrained"],
    ),
    "quantised": (
        lambda folder: edit_config(folder, quantization_config={"quant_method": "gptq"}),
        ["quantised (gptq)", "16-bit original"],
    ),
    "empty": (only_files, ["no config.json"]),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), ["none of model.safetensors"]),
    "config no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        ["config.json cannot be read"],
    ),
    "config a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        ["does not hold a JSON object"],
    ),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_is_no_model_is_called_by_its_name(kind, damaged, llamas):
    damage, said = UNUSABLE[kind]
    damage(damaged)
    found = refused(linear(llamas[1], damaged), 3)
    assert list(found) == ["$.models[1].model"]
    for words in ("damaged", *said):
        assert words in found["$.models[1].model"]


def test_a_missing_model_is_searched_beside_the_recipe_and_here(tmp_path, monkeypatch, llamas):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(json.dumps(linear("./nope", llamas[0])))
    found = refused(recipe, 3)["$.models[0].model"]
    assert "./nope does not exist" in found
    assert f"(looked in {tmp_path} and {tmp_path / 'here'})" in found
    (tmp_path / "nope").symlink_to(llamas[1])
    assert not moeforge.check(recipe).errors


def test_a_file_is_no_model(llamas):
    found = refused(linear(llamas[0] / WEIGHTS), 3)["$.models[0].model"]
    assert "is a file" in found
    assert "folder" in found


def test_local_folders_have_no_revisions(llamas):
    model = {"model": str(llamas[0]), "revision": "main"}
    recipe = {"merge_method": "passthrough", "models": [{"model": model}]}
    assert "has no revision main" in refused(recipe, 3)["$.models[0].model"]


def test_subfolders_of_one_model_are_different_models(llamas, tmp_path):
    for name, folder in zip(("one", "two"), llamas, strict=False):
        shutil.copytree(folder, tmp_path / "models" / name)
    recipe = linear()
    for name, weight in (("one", 1), ("two", 0)):
        model = {"model": str(tmp_path / "models"), "subfolder": name}
        recipe["models"].append({"model": model, "parameters": {"weight": weight}})
    moeforge.build(recipe, tmp_path / "out")
    result, first = (load_file(f / WEIGHTS) for f in (tmp_path / "out", llamas[0]))
    assert all(torch.equal(result[name], first[name]) for name in first)


# --- damaged files -------------------------------------------------------------------------------


def rewrite(folder, change=lambda header: None, length=None, keep=None):
    """Change a header, the length it claims, or cut the file after `keep` bytes."""
    path = folder / WEIGHTS
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text) if length is None else length) + text + raw[8 + size :]
    path.write_bytes(data[:keep])


def first_two(header):
    return sorted((e for n, e in header.items() if n[0] != "_"), key=lambda e: e["data_offsets"])[
        :2
    ]


def overlap(header):
    a, b = first_two(header)
    size = b["data_offsets"][1] - b["data_offsets"][0]
    b["data_offsets"] = [a["data_offsets"][0], a["data_offsets"][0] + size]


def hole(header):
    first_two(header)[0]["data_offsets"] = [0, 0]
    first_two(header)[0]["shape"] = [0]


DAMAGE = {
    "cut short": ({"keep": -1}, "was not downloaded whole"),
    "only a header": ({"keep": 5000}, "header"),
    "empty": ({"keep": 0}, "header"),
    "huge header": ({"length": 2**63}, f"cannot have a header of {2**63} bytes"),
    "no JSON": ({"length": 10}, "is not a readable safetensors file"),
    "overlap": ({"change": overlap}, "but the one before ends at"),
    "hole": ({"change": hole}, "but the one before ends at"),
    "wrong size": (
        {"change": lambda header: header[UP].update(shape=[1, 1])},
        f"{UP} has 24576 bytes for float32 [1, 1], which takes 4",
    ),
    "negative shape": (
        {"change": lambda header: header[UP].update(shape=[-96, -64])},
        "impossible shape",
    ),
    "unknown dtype": (
        {"change": lambda header: header[UP].update(dtype="F3")},
        "unknown dtype 'F3'",
    ),
    "no offsets": ({"change": lambda header: header[UP].pop("data_offsets")}, "lacks dtype"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_named(kind, damaged, llamas):
    changes, said = DAMAGE[kind]
    rewrite(damaged, **changes)
    found = refused(linear(llamas[1], damaged), 3)["$.models[1].model"]
    assert str(damaged / WEIGHTS) in found
    assert said in found
    assert "Download or export that file again." in found


def shard(folder, weight_map):
    (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"a": "../secret.safetensors"}, "outside the folder"),
        ({"a": "/etc/passwd"}, "outside the folder"),
        ({"a": ".."}, "outside the folder"),
        ({"a": "model-00002-of-00002.safetensors"}, "No such file"),
        ({"a": "model-00001-of-00001.safetensors"}, "lists 1 tensors that no file has"),
        ({"a": 1}, "has no weight_map"),
        (None, "has no weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(weight_map, said, damaged):
    shard(damaged, weight_map)
    assert said in refused(linear(damaged), 3)["$.models[0].model"]


def test_a_tensor_is_read_from_the_file_that_the_index_names(damaged, tmp_path):
    """Two files may hold a tensor of one name; the index says which one counts."""
    tensors = load_file(damaged / WEIGHTS)
    right, wrong = "a.safetensors", "b.safetensors"
    save_file(tensors, damaged / right)
    save_file(
        {UP: torch.zeros_like(tensors[UP]), "model.norm.weight": torch.ones(64)}, damaged / wrong
    )
    weight_map = dict.fromkeys(tensors, right)
    weight_map["model.norm.weight"] = wrong
    (damaged / WEIGHTS).unlink()
    (damaged / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    recipe = {"merge_method": "passthrough", "models": [{"model": str(damaged)}]}
    moeforge.build(recipe, tmp_path / "out")
    result = load_file(tmp_path / "out" / WEIGHTS)
    assert torch.equal(result[UP], tensors[UP])
    assert torch.equal(result["model.norm.weight"], torch.ones(64))


# --- models that do not fit ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"intermediate_size": 128}, "has intermediate_size 128,"),
        ({"hidden_size": 128}, "has hidden_size 128,"),
        ({"num_hidden_layers": 3}, "has 3 layers,"),
        ({"hidden_act": "gelu"}, "has activation gelu,"),
    ],
)
def test_experts_of_another_shape_are_refused(config, said, llamas, models):
    other = models("llama", seed=5, **config)
    found = refused(mixture(llamas[0], llamas[1], other), 4)
    assert list(found) == ["$.experts[1].source_model"]
    assert f"{other} {said}" in found["$.experts[1].source_model"]
    assert "se fine-tunes of " in found["$.experts[1].source_model"]


def test_experts_of_another_family_are_refused(llamas, models):
    found = refused(mixture(llamas[0], llamas[1], models("qwen2", seed=1)), 4)
    assert "is a qwen2 model" in found["$.experts[1].source_model"]


def test_bases_without_a_home_hear_of_the_families(models, llamas):
    mamba = models("mamba", seed=1)
    found = refused(mixture(mamba, mamba, mamba), 4)["$.base_model"]
    assert "no MoE architecture holds this mamba model exactly" in found
    assert "remote: " in found
    found = refused(mixture(llamas[0], *llamas[:2], architecture="qwen3_moe"), 4)["$.architecture"]
    assert "qwen3_moe: it holds qwen3; this is a llama model" in found


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "num_attention_heads"])
def test_a_base_whose_config_says_too_little_is_refused(key, damaged, llamas):
    edit_config(damaged, **{key: None})
    assert key in refused(mixture(damaged, *llamas[:2]), 4)["$.base_model"]


def test_experts_that_differ_in_what_the_base_brings_are_noted(llamas, models):
    changes = {"vocab_size": VOCABULARY + 20, "rms_norm_eps": 1e-5}
    other = models("llama", seed=5, with_tokenizer=False, **changes)
    report = moeforge.check(mixture(llamas[0], llamas[1], other))
    assert not report.errors
    notes = "\n".join(map(str, report.notes))
    assert f"{other} has 320 vocabulary entries, {llamas[0]} has 300" in notes
    assert "tokens it lacks are lost" in notes
    assert "rms_norm_eps" in notes


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_hidden_layers": 3}, f"has {LAYERS} layers"),
        ({"vocab_size": 320}, "the vocabularies differ"),
        ({"hidden_size": 128}, "hidden_size 128"),
        ({"intermediate_size": 128}, "intermediate_size 128"),
        # Twice the heads of half the width: every tensor has the same shape, none the same meaning.
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}, "8 attention heads"),
    ],
)
def test_merges_of_different_shapes_are_refused(config, said, llamas, models):
    other = models("llama", seed=5, **config)
    found = "\n".join(refused(linear(llamas[0], other), 4).values())
    assert said in found
    assert f"{other} has" in found or f" in {other}, but " in found


def test_merges_of_different_kinds_are_noted(llamas, models):
    other = models("mistral", seed=5, rms_norm_eps=1e-5)
    report = moeforge.check(linear(llamas[0], other))
    notes = "\n".join(map(str, report.notes))
    assert not report.errors
    assert f"{other} has model_type mistral, {llamas[0]} has llama" in notes
    assert "rms_norm_eps" in notes


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ((28, 36), f"layer_range [28, 36], but MODEL has {LAYERS} layers\nValid: 0 to {LAYERS},"),
        ((0, 5), f"layer_range [0, 5], but MODEL has {LAYERS} layers"),
        ((-1, 2), f"layer_range [-1, 2], but MODEL has {LAYERS} layers"),
        ((3, 3), "layer_range [3, 3] is empty\nFor layer 3 alone write [3, 4]"),
        ((3, 1), "layer_range [3, 1] is empty"),
    ],
)
def test_layer_ranges_must_lie_in_the_model(layers, said, llamas):
    found = refused(stack((llamas[0], (0, 2)), (llamas[0], layers)), 4)
    assert list(found) == ["$.slices[1].sources[0].layer_range"]
    assert said.replace("MODEL", str(llamas[0])) in found["$.slices[1].sources[0].layer_range"]


def test_ranges_of_one_slice_must_be_equally_long(llamas):
    recipe = stack((llamas[0], (0, 2)), merge_method="linear", parameters={"weight": 1})
    recipe["slices"][0]["sources"].append({"model": str(llamas[1]), "layer_range": [0, 3]})
    assert "[0, 2], [0, 3]" in refused(recipe, 4)["$.slices[0]"]


@pytest.mark.parametrize(
    ("kind", "config", "said"),
    [
        ("llama", {"intermediate_size": 128}, "intermediate_size 128"),
        ("llama", {"num_attention_heads": 8}, "8 attention heads"),
        ("llama", {"vocab_size": 320}, "320 vocabulary entries"),
        ("qwen2", {}, "is a qwen2 model"),
    ],
)
def test_stacks_of_different_models_are_refused(kind, config, said, llamas, models):
    other = models(kind, seed=5, **config)
    found = refused(stack((llamas[0], (0, 2)), (other, (2, 4))), 4)
    assert said in "\n".join(found.values())


@pytest.mark.parametrize(
    ("method", "count", "base", "said"),
    [
        ("slerp", 3, True, "slerp takes 2 models, here are 3"),
        ("slerp", 1, True, "slerp takes 2 models, here are 1"),
        ("slerp", 2, False, "slerp needs a base_model"),
        ("passthrough", 2, False, "passthrough takes 1 model, here are 2"),
    ],
)
def test_methods_take_their_number_of_models(method, count, base, said, llamas):
    recipe = {"merge_method": method, "models": [{"model": str(f)} for f in llamas[:count]]}
    recipe["parameters"] = {"t": 0.5} if method == "slerp" else {}
    if base:
        recipe["base_model"] = str(llamas[0])
    assert said in "\n".join(refused(recipe, 4).values())


def test_a_model_listed_twice_is_refused(llamas):
    found = refused(linear(llamas[0], llamas[1], llamas[0]), 4)
    assert list(found) == ["$.models[2]"]
    assert "is listed twice" in found["$.models[2]"]


# --- tensors without a place, places without a tensor --------------------------------------------

EXTRA = "model.layers.1.mlp.extra.weight"


@pytest.mark.parametrize("name", [EXTRA, "model.layers.1.self_attn.sinks", "score.weight"])
def test_tensors_without_a_place_are_not_dropped(name, damaged, llamas):
    change_tensors(damaged, **{name: torch.zeros(3)})
    found = refused(mixture(damaged, *llamas[:2]), 4)["$.base_model"] if ".mlp." not in name else ""
    if ".mlp." in name:
        found = refused(mixture(llamas[0], llamas[1], damaged), 4)["$.experts[1].source_model"]
    assert "has no place for 1 tensors" in found
    assert name in found
    found = refused(linear(damaged, llamas[1]), 4)["$"]
    assert f"{llamas[1]} lacks 1 tensors that other inputs have: {name}" in found


def test_absent_tensors_are_named(damaged, llamas):
    change_tensors(damaged, **{UP: None})
    found = refused(mixture(llamas[0], llamas[1], damaged), 4)["$.experts[1].source_model"]
    assert f"{damaged} lacks 1 tensors: {UP}" in found
    assert (
        f"lacks 1 tensors that other inputs have: {UP}"
        in refused(linear(damaged, llamas[1]), 4)["$"]
    )


def test_an_absent_attention_tensor_of_the_base_is_named(damaged, llamas):
    change_tensors(damaged, **{"model.layers.3.self_attn.k_proj.weight": None})
    found = refused(mixture(damaged, *llamas[:2]), 4)["$.base_model"]
    assert "lacks 1 tensors: model.layers.3.self_attn.k_proj.weight" in found


def test_an_absent_head_is_not_taken_for_a_tied_one(damaged, llamas):
    change_tensors(damaged, **{"lm_head.weight": None})
    found = refused(linear(damaged, llamas[1]), 3)["$.models[0].model"]
    assert "lacks lm_head.weight" in found


def test_integers_are_kept_where_all_agree(damaged, llamas, tmp_path):
    second = tmp_path / "second"
    shutil.copytree(llamas[1], second)
    for folder in (damaged, second):
        change_tensors(folder, **{"model.counter": torch.arange(3)})
    moeforge.build(linear(damaged, second), tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / WEIGHTS)["model.counter"], torch.arange(3))
    change_tensors(second, **{"model.counter": torch.tensor([0, 1, 3])})
    with pytest.raises(BuildError, match="differs between the models"):
        moeforge.build(linear(damaged, second), tmp_path / "differ")
    assert not (tmp_path / "differ").exists()
    change_tensors(second, **{"model.counter": torch.arange(3.0)})
    found = refused(linear(damaged, second), 4)["$"]
    assert "model.counter is int64, which linear cannot compute with" in found


# --- prompts, tokenizers, texts ------------------------------------------------------------------


def test_fitted_needs_prompts_that_differ(llamas):
    found = refused(mixture(*llamas, gate_mode="fitted"), 4)
    assert list(found) == ["$.experts[0]", "$.experts[1]"]
    assert "gate mode fitted needs prompts" in found["$.experts[0]"]
    found = refused(mixture(*llamas, prompts=[["same"], ["same"]]), 4)
    assert list(found) == ["$.experts[1]"]
    assert "experts[0] has the same prompts" in found["$.experts[1]"]


def test_a_tokenizer_is_needed_only_where_prompts_are_read(llamas, models):
    bare = models("llama", seed=1, with_tokenizer=False)
    assert not has_tokenizer(bare)
    found = refused(mixture(bare, *llamas[:2], prompts=[["a"], ["b"]]), 4)["$.base_model"]
    assert f"reads prompts, but {bare} has no tokenizer" in found
    report = moeforge.check(mixture(bare, *llamas[:2]))
    assert not report.errors
    assert "has no tokenizer: the output has none" in str(report.notes[0])
    assert not moeforge.check(mixture(llamas[0], bare, bare)).notes


def test_held_out_texts_must_exist(llamas, tmp_path):
    (tmp_path / "there.txt").write_text("text")
    recipe = tmp_path / "recipe.yml"
    texts = {"code": "there.txt", "prose": "not-there.txt", "folder": "."}
    recipe.write_text(json.dumps(linear(*llamas, evaluate=texts)))
    found = refused(recipe, 4)
    assert sorted(found) == ["$.evaluate.folder", "$.evaluate.prose"]
    assert "not-there.txt does not exist" in found["$.evaluate.prose"]


# --- everything at once --------------------------------------------------------------------------


def test_all_mistakes_of_a_mixture_are_in_one_report(llamas, models, damaged):
    rewrite(damaged, keep=-1)
    narrow = models("llama", seed=5, intermediate_size=64)
    inline = linear(llamas[0], models("llama", seed=5, num_hidden_layers=3))
    inline["models"][0]["parameters"] = {"wieght": 1}
    recipe = mixture(llamas[0], "./nope", narrow, damaged, llamas[1])
    recipe["experts"].append({"source_model": inline})
    found = refused(recipe, 3)
    assert sorted(found) == [
        "$.experts[0].source_model",
        "$.experts[1].source_model",
        "$.experts[2].source_model",
        "$.experts[4].source_model",
        "$.experts[4].source_model.models[0].parameters.wieght",
    ]


def test_all_mistakes_of_a_stack_are_in_one_report(llamas):
    recipe = stack((llamas[0], (0, 9)), ("./nope", (3, 3)), (llamas[0], (2, 2)))
    recipe["slices"][1]["parameters"] = {"scael": 2}
    recipe["slices"][2]["sources"].append({"model": "./neither", "layer_range": [0, 2]})
    found = refused(recipe, 3)
    assert sorted(found) == [
        "$.slices[0].sources[0].layer_range",
        "$.slices[1].parameters.scael",
        "$.slices[1].sources[0].layer_range",
        "$.slices[1].sources[0].model",
        "$.slices[2]",
        "$.slices[2].sources[0].layer_range",
        "$.slices[2].sources[1].model",
    ]


def test_mistakes_of_one_inline_recipe_do_not_hide_those_of_another(llamas, models):
    wide = models("llama", seed=5, intermediate_size=128)
    first, second = linear(llamas[0], wide), linear(llamas[1], wide)
    found = refused(linear(first, second), 4)
    assert sorted(found) == ["$.models[0].model.models[1]", "$.models[1].model.models[1]"]


# --- nothing is left -----------------------------------------------------------------------------


def build(recipe, out, *options):
    path = out.parent / "recipe.yml"
    path.write_text(json.dumps(recipe))
    return warm.moeforge("build", path, "-o", out, *options, env={**os.environ, "COLUMNS": "80"})


@pytest.mark.parametrize(
    ("recipe", "code", "said"),
    [
        (lambda llamas: {**linear(*llamas), "dtyp": "float32"}, 2, 'did you mean "dtype"?'),
        (lambda llamas: linear(llamas[0], "./nope"), 3, "./nope does not exist"),
        (lambda llamas: stack((llamas[0], (28, 36))), 4, "the end is exclusive"),
        (lambda llamas: mixture(*llamas, gate_mode="fitted"), 4, "needs prompts"),
    ],
)
def test_a_refused_build_says_so_and_leaves_nothing(recipe, code, said, llamas, tmp_path):
    run = build(recipe(llamas), tmp_path / "out")
    assert run.returncode == code
    assert run.stdout == ""
    assert all(line.startswith(("error: line ", "    ")) for line in run.stderr.splitlines())
    assert said in run.stderr
    assert os.listdir(tmp_path) == ["recipe.yml"]


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_what_stands_in_the_way_is_not_touched(llamas, tmp_path):
    recipe, out = linear(*llamas), tmp_path / "out"
    moeforge.build(linear(llamas[0]), out)
    before = contents(tmp_path)
    with pytest.raises(BuildError, match="exists") as caught:
        moeforge.build(recipe, out)
    assert "--overwrite" in str(caught.value)
    assert contents(tmp_path) == before

    moeforge.build(recipe, out, overwrite=True)
    assert contents(tmp_path).keys() == before.keys()
    assert (out / WEIGHTS).read_bytes() != before[out / WEIGHTS]

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("words")
    before = contents(tmp_path)
    for name in ("thesis", "file"):
        for overwrite in (False, True):
            with pytest.raises(BuildError, match="not a model folder" if overwrite else "exists"):
                moeforge.build(recipe, tmp_path / name, overwrite=overwrite)
    assert contents(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["file", "out", "thesis"]


def test_a_build_that_fails_at_its_end_keeps_its_work_beside_the_output(llamas, tmp_path):
    """That a held-out text is too short is known only when everything else is written."""
    recipe = linear(*llamas, evaluate={"code": str(tmp_path / "held-out.txt")})
    (tmp_path / "held-out.txt").write_text("")
    with pytest.raises(MoeforgeError, match="held-out"):
        moeforge.build(recipe, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == [".out.moeforge", "held-out.txt"]
    (tmp_path / "held-out.txt").write_text("long enough to be measured " * 100)
    moeforge.build(recipe, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["held-out.txt", "out"]


def test_a_damaged_model_does_not_replace_a_good_one(llamas, damaged, tmp_path):
    moeforge.build(linear(llamas[0]), tmp_path / "out")
    before = contents(tmp_path / "out")
    rewrite(damaged, keep=-1)
    with pytest.raises(MoeforgeError, match="not downloaded whole"):
        moeforge.build(linear(damaged, llamas[1]), tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before
    assert sorted(os.listdir(tmp_path)) == ["damaged", "out"]


def test_a_misspelt_path_that_looks_like_a_hub_id_names_its_neighbour(llamas, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "python").symlink_to(llamas[0])
    path = tmp_path / "recipe.yml"
    path.write_text(
        "merge_method: linear\nmodels: [{model: models/pyton}]\nparameters: {weight: 1}\n"
    )
    report = moeforge.check(path)
    assert report.exit_code == 3
    assert 'models is here, but has no pyton — did you mean "python"?' in report.errors[0].what

"""Recipes to begin with: the shelf, `moeforge new`, and the schema for editors."""

import json
import os
import pty
import re
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml
from pages import BLOCKS
from safetensors.torch import load_file
from tiny import tokenizer
from transformers import AutoModelForCausalLM, BertConfig, BertModel
from typer.testing import CliRunner

import moeforge
from moeforge import starter
from moeforge.cli import app
from moeforge.errors import RecipeError
from moeforge.recipe import document
from moeforge.recipe import parse as parse_recipe
from moeforge.recipe.json_schema import json_schema
from moeforge.starter import shelf

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
VALIDATOR = jsonschema.Draft7Validator(json_schema())
WEIGHTS = "model.safetensors"
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


# --- the schema ----------------------------------------------------------------------------------


def texts():
    """Every recipe that the repository says is one."""
    files = [*RECIPES.glob("*.yml"), *(ROOT / "tests" / "parity" / "recipes").glob("*.yml")]
    yield from ((path.name, path.read_text()) for path in files)
    for block in BLOCKS:
        if block.mark.startswith("example: plan"):
            yield f"{block.page.name}:{block.line}", block.text


def test_the_published_schema_is_that_of_this_version():
    assert json.loads((ROOT / "docs" / "schema" / "recipe.json").read_text()) == json_schema(), (
        "run moeforge schema -o docs/schema/recipe.json"
    )
    jsonschema.Draft7Validator.check_schema(json_schema())


def test_the_schema_accepts_every_recipe_of_the_repository():
    found = dict(texts())
    assert len(found) > 150
    refused = {
        name: error.message
        for name, text in found.items()
        for error in VALIDATOR.iter_errors(document.parse(text).data)
    }
    assert not refused


def merge(model="a", **more):
    return {"merge_method": "linear", "models": [{"model": model}], **more}


def moe(**more):
    return {"base_model": "a", "experts": [{"source_model": "b"}], "experts_per_token": 1, **more}


STACK = {"slices": [{"sources": [{"model": "a", "layer_range": ["0", 4]}]}]}
SPELLINGS = [
    merge({"model": {"path": "a", "revision": "main"}, "lora": {"path": "b"}}),
    merge({"model": "a", "lora": "b@main", "subfolder": None}),
    merge({"model": merge(), "lora": {"model": "b"}}, slices=[], modules=None),
    merge(STACK, dtype="torch.bfloat16", out_dtype="", parameters=None),
    merge(parameters={"normalize": "yes", "weight": [0, "1e-5", 1], "t": {"value": 1}}),
    merge(parameters={"weight": [{"filter": "mlp", "value": [0, 1]}, {"value": 1}]}),
    merge(tokenizer_source={"model": "a"}, chat_template="chatml", seed=7),
    merge(tokenizer={"source": "base", "tokens": {"x": {"source": {"kind": "zero"}}}}),
    STACK,
    moe(architecture="Qwen", layers={"every": 2}, shared_experts=None, gate_parameters=None),
    moe(layers=[0, [2, 4]], tune={"text": "a.txt", "learning_rate": "1e-3"}),
    moe(gate_parameters={"balance": [1], "labels": "loss", "data": "p.jsonl"}),
    moe(experts=[{"source_model": [{"model": "b", "layer_range": [0, 2]}], "noise_scale": 0}]),
]
MISTAKES = [
    {},
    merge(merge_mehtod="linear"),
    merge(merge_method="linaer"),
    merge(parameters={"wieght": 1}),
    merge(parameters={"weight": "much"}),
    merge(parameters={"weight": [{"filtre": "mlp", "value": 1}]}),
    merge({"modl": "a"}),
    merge(merge(merge_method="none")),
    merge(dtype="bf16"),
    merge(slices=STACK["slices"]),
    merge(tokenizer={"sorce": "base"}),
    {"slices": [{"sources": [{"model": "a", "layer_range": [0]}]}]},
    moe(gate_mode="fited"),
    moe(architecture="mixtrall"),
    moe(experts=[{"source_model": "b", "positive_promts": ["x"]}]),
    moe(experts=[{"source_model": "b", "noise_scale": -0.1}]),
    moe(experts_per_token=0),
    moe(gate_parameters={"labels": "owners"}),
    moe(layers="some"),
    {"base_model": "a", "experts": []},
]


def is_recipe(data):
    try:
        parsed = parse_recipe(json.dumps(data), Path(), "recipe")
    except RecipeError:
        return False
    settings = getattr(parsed.recipe, "parameters", {})
    return "wieght" not in settings and "much" not in str(settings)  # which the planner refuses


def test_the_schema_and_the_reader_agree():
    for data in SPELLINGS:
        assert is_recipe(data), data
        assert not [error.message for error in VALIDATOR.iter_errors(data)], data
    for data in MISTAKES:
        assert not is_recipe(data), data
        assert not VALIDATOR.is_valid(data), data


def test_the_schema_says_what_each_key_is_for():
    silent = [
        f"{name}.{key}"
        for name, definition in json_schema()["definitions"].items()
        for key, value in definition.get("properties", {}).items()
        if len(value["description"]) < 5
    ]
    assert not silent


# --- models for the recipes that name others -----------------------------------------------------


def adapter(base, folder):
    """An adapter of the MLPs of `base` as peft saves it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    """Tiny models of the kinds that the recipes name, by id."""
    root = tmp_path_factory.mktemp("shelf")
    mistral = models("mistral", num_hidden_layers=32, **SMALL)
    found = {"mistralai/Mistral-7B-v0.1": mistral}
    for seed, name in enumerate(("Xwin-LM/Xwin-LM-70B-V0.1", "Sao10K/Euryale-1.3-L2-70B")):
        found[name] = models("llama", seed, num_hidden_layers=80, **SMALL)
    shape = {**SMALL, "num_hidden_layers": 1, "vocab_size": 300}
    for name in ("BAAI/bge-base-en-v1.5", "Shitao/bge-hotpotqa", "Shitao/bge-quora"):
        torch.manual_seed(len(found))
        found[name] = root / name
        BertModel(BertConfig(**shape)).save_pretrained(found[name])
        tokenizer().save_pretrained(found[name])
    for name in ("./adapters/code", "./adapters/german"):
        found[name] = adapter(mistral, root / name)
    (root / "prompts").mkdir()
    for name in ("code", "german"):
        (root / "prompts" / f"{name}.jsonl").write_text(json.dumps({"text": f"of {name}"}))
    (root / "quickstart").symlink_to(RECIPES / "quickstart")
    return root, {name: str(folder) for name, folder in found.items()}


def local(name, folders):
    """Recipe `name` of the shelf with tiny models for those of the Hub, and without texts."""
    root, found = folders
    text = (RECIPES / f"{name}.yml").read_text()
    for original, folder in found.items():
        text = text.replace(original, folder)
    data = {key: value for key, value in yaml.safe_load(text).items() if key != "evaluate"}
    (root / f"{name}.yml").write_text(yaml.safe_dump(data))
    return root / f"{name}.yml"


# --- the shelf -----------------------------------------------------------------------------------


def test_the_shelf_is_what_the_templates_make():
    files = {path.stem: path.read_text() for path in RECIPES.glob("*.yml")}
    made = {name: shelf.text_of(name, RECIPES) for name in shelf.SHELF}
    assert {name: files[name] for name in made} == made, "run python -m moeforge.starter.shelf"
    assert files.keys() - made.keys() == {"quickstart"}
    assert {entry.kind for entry in shelf.SHELF.values()} == starter.KINDS.keys()


def test_every_recipe_begins_with_the_way_to_the_schema():
    for path in RECIPES.glob("*.yml"):
        found = re.match(r"# yaml-language-server: \$schema=(.*)\n", path.read_text())
        assert found, path
        assert json.loads((RECIPES / found[1]).read_text())["title"] == "moeforge recipe"


@pytest.mark.parametrize("name", [*shelf.SHELF, "quickstart"])
def test_the_shelf_plans(name, folders):
    report = moeforge.check(local(name, folders))
    assert not report.errors
    assert not [note for note in report.notes if note.warning]


def layers_of(plan):
    """For each layer of a plan, the model and the layer that it is a copy of."""
    name = "model.layers.{}.mlp.up_proj.weight"
    exprs = {tensor.name: tensor.expr for tensor in plan.tensors}
    depth = plan.config["num_hidden_layers"]
    reads = [exprs[name.format(layer)] for layer in range(depth)]
    return [(read.source, int(read.name.split(".")[2])) for read in reads]


def test_solar_has_the_middle_layers_twice(folders):
    layers = layers_of(moeforge.plan(local("upscale", folders)))
    assert [layer for _, layer in layers] == [*range(24), *range(8, 32)]


def test_the_120b_frankenmerge_is_as_goliaths_card_says(folders):
    xwin, euryale = (folders[1][name] for name in folders[1] if "70B" in name)
    starts, ends = (0, 8, 17, 25, 33, 41, 49, 57, 65), (16, 24, 32, 40, 48, 56, 64, 72, 80)
    wanted = [
        ((xwin, euryale)[number % 2], layer)
        for number, (start, end) in enumerate(zip(starts, ends, strict=True))
        for layer in range(start, end)
    ]
    assert layers_of(moeforge.plan(local("frankenmerge-120b", folders))) == wanted


def test_ranges_in_turn_reach_every_layer_of_models_of_any_depth():
    from moeforge.starter.rendering import interleaved

    for depth in range(1, 130):
        ranges = interleaved(depth)
        assert ranges[0][0] == 0
        assert ranges[-1][1] == depth
        assert all(start < end <= depth for start, end in ranges), depth
        assert all(b[0] <= a[1] + 1 for a, b in pairwise(ranges)), depth


def built(name, folders, out):
    moeforge.build(local(name, folders), out / name, threads=1)
    return out / name


@pytest.mark.parametrize("name", ["ties", "moe", "moe-merges", "moe-shared"])
def test_the_shelf_builds(name, folders, tmp_path):
    """Soup and frankenmerge are built by the documents' commands; others below."""
    assert (built(name, folders, tmp_path) / WEIGHTS).exists()


def test_slerp_goes_from_one_model_to_the_other(folders, tmp_path):
    result = load_file(built("slerp", folders, tmp_path) / WEIGHTS)
    ends = {0: "german", 3: "french"}
    for layer, name in ends.items():
        for key, tensor in load_file(RECIPES / "quickstart" / name / WEIGHTS).items():
            if f"layers.{layer}." in key:
                assert torch.equal(result[key], tensor), key


def test_an_upcycled_model_computes_what_the_dense_one_does(folders, tmp_path):
    ids = torch.arange(3, 40)[None]
    dense, mixture = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        for folder in (RECIPES / "quickstart" / "base", built("upcycle", folders, tmp_path))
    )
    assert (dense - mixture).abs().max() < 1e-4 * dense.abs().max()


def test_with_a_shared_expert_the_mixture_begins_half_as_the_base(folders, tmp_path):
    """Where all experts are the base, half of it and half of an expert are the base."""
    recipe = local("moe-shared", folders)
    data = yaml.safe_load(recipe.read_text())
    for expert in data["experts"]:
        expert["source_model"] = data["base_model"]
    recipe.write_text(yaml.safe_dump({**data, "gate_mode": "random"}))
    for expert in data["experts"]:
        expert.pop("positive_prompts")
    moeforge.build(recipe, tmp_path / "out", threads=1)
    ids = torch.arange(3, 40)[None]
    dense, mixture = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        for folder in (RECIPES / "quickstart" / "base", tmp_path / "out")
    )
    assert (dense - mixture).abs().max() < 1e-4 * dense.abs().max()


def test_half_of_the_embedding_model_is_the_general_one(folders, tmp_path):
    result = load_file(built("embedding", folders, tmp_path) / WEIGHTS)
    names = ("BAAI/bge-base-en-v1.5", "Shitao/bge-hotpotqa", "Shitao/bge-quora")
    base, one, other = (load_file(Path(folders[1][name], WEIGHTS)) for name in names)
    for key, tensor in result.items():
        expected = base[key].double() / 2 + one[key].double() / 4 + other[key].double() / 4
        assert (tensor.double() - expected).abs().max() < 1e-6, key


# --- moeforge new --------------------------------------------------------------------------------


def new(*words):
    return CliRunner().invoke(app, ["new", *map(str, words)])


@pytest.mark.parametrize("kind", starter.KINDS)
def test_what_new_writes_is_fine_as_it_stands(kind, folders, llamas, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, found = folders
    asked = starter.KINDS[kind]
    base, *ours = [*llamas, llamas[0]]
    if kind == "moe-loras":
        base = found["mistralai/Mistral-7B-v0.1"]
        ours = [found[name] for name in found if "adapters" in name]
    if kind == "embedding":
        base, *ours = [found[name] for name in found if "bge" in name]
    words = [word for model in ours[: asked.models[0]] for word in ("-m", model)]
    if asked.base != "none":
        words += ["-b", base]
    done = new(kind, *words)
    assert done.exit_code == 0, done.output
    report = moeforge.check(Path(f"{kind}.yml"))
    assert not report.errors
    told = [note for note in report.notes if note.warning]
    if asked.prompts:
        (note,) = told
        numbers = range(asked.experts(asked.models[0]))
        named = ", ".join(f"experts[{number}]" for number in numbers)
        assert note.what.startswith(f"prompts of {named} are the placeholders of `moeforge new`")
        assert "in place of the placeholders" in done.output
    else:
        assert not told
    text = Path(f"{kind}.yml").read_text()
    schema = re.match(r"# yaml-language-server: \$schema=(.*)\n", text)[1]
    jsonschema.Draft7Validator(json.loads(Path(schema).read_text())).validate(yaml.safe_load(text))
    assert max(map(len, re.sub(r"/\S+", "", text).splitlines())) <= 100


@pytest.mark.parametrize("method", starter.KINDS["ties"].methods)
def test_every_method_that_new_offers_has_its_parameters(method, llamas, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, one, other = llamas
    assert new("ties", "-b", base, "-m", one, "-m", other, "--method", method).exit_code == 0
    report = moeforge.check(Path("ties.yml"))
    assert not [*report.errors, *report.notes]


def test_new_says_all_that_is_missing_at_once_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = new("moe", "-m", "a", "--method", "ties", "--dtype", "bf16", "--prompts", "p.txt")
    assert done.exit_code == 2
    for said in ("at least 2 experts, got 1", "needs a base", "the method", 'dtype "bf16"'):
        assert said in done.output
    assert 'did you mean "moe-loras"' in new("moe-lora").output
    (error,) = json.loads(new("--json").stdout)["errors"]
    assert "moe-loras" in error["what"]
    assert new("soup", "-m", "a+b+c", "-m", "d").exit_code == 2
    assert new("upscale", "-m", "./nowhere").exit_code == 3
    assert new("upscale", "-m", "a@b@c").exit_code == 2
    assert not os.listdir(tmp_path)


def test_new_writes_over_nothing_without_force(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yml").write_text("mine")
    words = ("soup", "-m", "a", "-m", "b", "-o", "mine.yml")
    assert new(*words).exit_code == 2
    with pytest.raises(RecipeError, match="exists"):
        starter.write("soup", starter.Answers(("a", "b")), Path("mine.yml"))
    assert Path("mine.yml").read_text() == "mine"
    assert "exists" in new("soup", "-o", "mine.yml").output  # before anything else is said
    assert new(*words, "--force").exit_code == 0
    Path("moeforge.schema.json").write_text("{}")
    assert new(*words, "--force").exit_code == 2
    assert Path("moeforge.schema.json").read_text() == "{}"


def test_a_recipe_elsewhere_finds_the_models(llamas, tmp_path, monkeypatch):
    """Named from here, in folders whose names YAML and recipes would read as something else."""
    monkeypatch.chdir(tmp_path)
    names = ["a: #1", "c++", "2024-01-01"]
    for name, folder in zip(names, llamas, strict=True):
        Path(name).symlink_to(folder)
    words = ["-b", names[0]]
    for name in names[1:]:
        Path(f"{name}.txt").write_text(f"one of {name}\n\ntwo")
        words += ["-m", name, "--prompts", f"{name}.txt"]
    done = new("moe", *words, "-o", "sub/my recipe.yml")
    assert done.exit_code == 0, done.output
    monkeypatch.chdir("/")
    report = moeforge.check(tmp_path / "sub" / "my recipe.yml")
    assert not report.errors


def test_a_name_in_a_recipe_is_that_name():
    names = "a b/c-d ./e ../f ~/g /h org/name@v1 01-ai/Yi 12 1.5 1e5 0x1F 1_0 2024-01-01 .inf ~ - _"
    names += " no On true NULL y a:b #c {d} [e] & * ! | > % @f `g a\u2028b é \U0001f600 '' \" \\"
    for name in [*names.split(" "), "a: b", "a #b", " a", "a\nb"]:
        assert yaml.safe_load(f"[{starter.rendering.scalar(name)}]") == [name]
        assert yaml.safe_load(f"{{model: {starter.rendering.scalar(name)}}} # c") == {"model": name}
    assert starter.rendering.scalar("org/name@v1.0") == "org/name@v1.0"


def test_the_kinds_are_listed():
    listed = json.loads(new("--list", "--json").output)
    assert [entry["kind"] for entry in listed] == [*starter.KINDS]
    done = new("--list")
    assert all(kind in done.output for kind in starter.KINDS)


def test_new_asks_on_a_terminal_and_imports_nothing_heavy(llamas, tmp_path):
    base, one, other = map(str, llamas)
    ours, theirs = pty.openpty()
    answers = ["ties", base, one, other, "", "dare_ties", "bfloat16"]
    os.write(ours, "".join(f"{answer}\n" for answer in answers).encode())
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "moeforge", "new"],
        cwd=tmp_path,
        stdin=theirs,
        capture_output=True,
        text=True,
        timeout=60,
    )
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 0, done.stdout
    heavy = r"\| +(torch|transformers|huggingface_hub|accelerate|matplotlib|scipy)$"
    assert not re.search(heavy, done.stderr, re.MULTILINE)
    written = yaml.safe_load((tmp_path / "ties.yml").read_text())
    assert written["merge_method"] == "dare_ties"
    assert written["dtype"] == "bfloat16"
    assert [entry["model"] for entry in written["models"]] == [one, other]


def test_schema_is_printed_or_written(tmp_path):
    printed = CliRunner().invoke(app, ["schema"])
    assert json.loads(printed.output) == json_schema()
    (tmp_path / "other.json").write_text('{"title": "other"}')
    for name, code in (("new.json", 0), ("new.json", 0), ("other.json", 2)):
        done = CliRunner().invoke(app, ["schema", "-o", str(tmp_path / name)])
        assert done.exit_code == code, done.output
    assert json.loads((tmp_path / "new.json").read_text()) == json_schema()

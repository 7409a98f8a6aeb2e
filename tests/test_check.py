"""What is said before a build: models side by side, values, needs, origins, strictness."""

import io
import json
import shutil
from pathlib import Path

import pytest
import warm
import yaml
from hub_server import HubServer
from rich.console import Console
from safetensors.torch import load_file
from tiny import edit_config

import moeforge
from moeforge import checking
from moeforge.checking import compatibility, explain, needs, origins
from moeforge.errors import BuildError, PlanError
from moeforge.output.journal import Journal
from moeforge.output.layout import lay_out
from moeforge.plans import Read

WEIGHTS = "model.safetensors"


def shown(*arguments, code=0, cwd=None, env=None):
    """Standard output and error of a command."""
    run = warm.moeforge(*arguments, cwd=cwd, env=env)
    assert run.returncode == code, run.stderr
    assert "Traceback" not in run.stderr
    return run.stdout, run.stderr


def linear(*folders, **changes):
    models = [{"model": str(folder), "parameters": {"weight": 1}} for folder in folders]
    return {"merge_method": "linear", "models": models, **changes}


def mixture(base, *experts, **changes):
    entries = [e if isinstance(e, dict) else {"source_model": str(e)} for e in experts]
    return {"base_model": str(base), "experts": entries, "gate_mode": "random", **changes}


def written(folder, data):
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(data))
    return path


def text_of(part):
    """What a terminal shows of a table."""
    console = Console(record=True, file=io.StringIO(), width=120)
    console.print(part)
    return console.export_text()


# --- models side by side -------------------------------------------------------------------------


def test_the_odd_cell_is_marked(models, llamas, tmp_path):
    other = models("llama", seed=5, rope_theta=500000.0, intermediate_size=256)
    recipe = written(tmp_path, mixture(llamas[0], llamas[1], other))
    found = checking.check(recipe).compared
    assert found.labels == (str(llamas[0]), str(llamas[1]), str(other))
    odd = {name for name in found.facts if any(found.odd(name))}
    assert odd == {"rope theta", "intermediate"}
    assert found.odd("rope theta") == (False, False, True)
    assert found.facts["heads"] == (4, 4, 4)
    assert found.facts["dtype"] == ("float32",) * 3
    out, err = shown("check", recipe, code=4)
    assert "≠ 500000.0" in out
    assert "intermediate_size 256" in err
    data = json.loads(shown("check", recipe, "--json", code=4)[0])
    assert data["models"]["facts"]["intermediate"]["odd"] == [False, False, True]


def test_models_that_agree_make_no_table(llamas, tmp_path):
    recipe = written(tmp_path, linear(*llamas))
    assert "heads" not in shown("check", recipe)[0]
    assert not checking.check(recipe).compared.differs


def test_one_model_is_compared_with_none(llamas):
    assert checking.check(linear(llamas[0])).compared is None


def test_heads_without_head_dim_are_compared_by_width(models, llamas):
    """head_dim follows from width and heads where config.json does not say it."""
    silent = models.copy(llamas[0], "silent")
    edit_config(silent, head_dim=None)
    found = checking.check(linear(llamas[1], silent)).compared
    assert found.facts["head_dim"][0] == found.facts["head_dim"][1]


# --- values --------------------------------------------------------------------------------------


def test_layers_made_alike_are_one_group(llamas, tmp_path):
    recipe = {
        "merge_method": "slerp",
        "base_model": str(llamas[0]),
        "models": [{"model": str(folder)} for folder in llamas[:2]],
        "parameters": {"t": [{"filter": "mlp", "value": [0, 0, 1, 1]}, {"value": 0.25}]},
    }
    groups = explain.groups(moeforge.plan(recipe))
    inside = {
        (each.layers, each.made.split(":")[0]) for each in groups if "mlp.up_proj" in each.tensors
    }
    assert inside == {("0-1", "slerp t 0"), ("2-3", "slerp t 1")}
    (rest,) = [each for each in groups if "self_attn.q_proj" in each.tensors]
    assert (rest.layers, rest.made.split(":")[0]) == ("0-3", "slerp t 0.25")
    out, _ = shown("check", written(tmp_path, recipe), "--explain")
    assert "slerp t 0.25" in out


def test_a_stack_says_how_far_its_layers_moved(llamas):
    slices = [
        {"sources": [{"model": str(llamas[0]), "layer_range": [0, 3]}]},
        {"sources": [{"model": str(llamas[1]), "layer_range": [1, 4]}]},
    ]
    groups = explain.groups(moeforge.plan({"slices": slices}))
    assert {(each.layers, each.made) for each in groups if each.tensors == ("all",)} == {
        ("0-2", str(llamas[0])),
        ("3-5", f"{llamas[1]} (layer -2)"),
    }


def test_gates_are_explained_as_they_will_be(llamas, tmp_path):
    experts = [
        {"source_model": str(llamas[1]), "positive_prompts": ["one two", "three"]},
        {"source_model": str(llamas[2]), "positive_prompts": ["1 2 3"], "negative_prompts": ["x"]},
    ]
    recipe = written(tmp_path, mixture(llamas[0], *experts, gate_mode="fitted"))
    data = json.loads(shown("check", recipe, "--explain", "--json")[0])["explained"]
    assert data["gates"]["experts_per_token"] == 2
    assert [expert["positive_prompts"] for expert in data["experts"]] == [2, 1]
    assert [expert["negative_prompts"] for expert in data["experts"]] == [0, 1]


# --- needs ---------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_an_error_with_numbers(llamas, tmp_path, monkeypatch):
    monkeypatch.setattr(needs.engine, "free_space", lambda folder: 1000)
    report = checking.check(linear(*llamas[:2]), tmp_path / "out")
    assert report.exit_code == 5
    (error,) = report.errors
    size = (llamas[0] / WEIGHTS).stat().st_size / 1e3
    assert f"takes {size:.0f} kB" in error.what
    assert "1 kB free" in error.what
    half = sum(tensor.nbytes for tensor in load_file(llamas[0] / WEIGHTS).values()) / 2e3
    assert f"dtype: bfloat16 (saves {half:.0f} kB)" in error.fix
    (narrow,) = checking.check(linear(*llamas[:2], dtype="bfloat16"), tmp_path / "out").errors
    assert "bfloat16" not in narrow.fix


def test_short_memory_is_a_warning_and_strict_makes_it_an_error(llamas, tmp_path, monkeypatch):
    monkeypatch.setattr(needs, "free_memory", lambda: 1000)
    report = checking.check(linear(*llamas[:2]))
    assert report.exit_code == 0
    assert [note.warning for note in report.notes if "of memory" in note.what] == [True]
    assert checking.check(linear(*llamas[:2]), strict=True).exit_code == 4
    with pytest.raises(PlanError, match="of memory, 1 kB are free"):
        moeforge.build(linear(*llamas[:2]), tmp_path / "out", strict=True)
    assert not list(tmp_path.iterdir())


def stop_after_first_file(monkeypatch):
    """Let a build fail as soon as its journal has one file."""
    add = Journal.add

    def added(self, name, seal):
        add(self, name, seal)
        raise OSError("stopped here")

    monkeypatch.setattr(Journal, "add", added)


def test_a_stopped_build_needs_what_is_left_of_it(llamas, tmp_path, monkeypatch):
    recipe, out, half = linear(*llamas[:2]), tmp_path / "out", 400_000
    monkeypatch.setattr(needs, "lay_out", lambda tensors: lay_out(tensors, half))
    fresh = checking.check(recipe, out).needs
    assert (fresh.files, fresh.kept) == (2, 0)
    with monkeypatch.context() as patch:
        stop_after_first_file(patch)
        with pytest.raises(BuildError, match="stopped here"):
            moeforge.build(recipe, out, shard_size=half, threads=1, verify=False)
    work = tmp_path / ".out.moeforge"
    (kept,) = (work / "model").glob("*.safetensors")
    (work / "model" / "half").write_bytes(bytes(1 << 20))  # of a run that was killed
    monkeypatch.setattr(needs.engine, "free_space", lambda folder: 0)
    found = checking.check(recipe, out)
    assert (found.needs.files, found.needs.kept) == (2, 1)
    assert found.needs.disk == fresh.disk - kept.stat().st_size
    assert 1 << 20 <= found.needs.disk_free < (1 << 20) + 16384, "what the build removes is free"
    assert found.exit_code == 0
    assert "goes on with 1 of 2 files" in " ".join(text_of(needs.needs_table(found.needs)).split())
    other = checking.check(linear(*llamas[1:]), out).needs
    assert (other.kept, other.disk) == (0, fresh.disk)
    assert other.disk_free > (1 << 20) + kept.stat().st_size
    built = moeforge.build(recipe, out, shard_size=half, verify=False)
    assert any("going on where the last run stopped" in note.what for note in built.notes)


def test_running_the_result_is_counted_where_it_is_done(llamas, tmp_path, monkeypatch):
    plan = moeforge.plan(mixture(*llamas))
    base = needs.engine.INTERPRETER + needs.TRANSFORMERS
    monkeypatch.setattr(needs, "free_memory", lambda: 16 * plan.parameters)
    found = checking.check(mixture(*llamas)).needs
    assert found.looking == base + plan.nbytes
    assert "while the result is run" in text_of(needs.needs_table(found))
    assert checking.check(linear(*llamas)).needs.looking == 0
    monkeypatch.setattr(needs, "free_memory", lambda: 16 * plan.parameters - 1)
    assert checking.check(mixture(*llamas)).needs.looking == 0


def test_free_memory_is_what_the_machine_says():
    lines = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    total = 1024 * int(lines["MemTotal"].split()[0])
    assert 0 < needs.free_memory() <= total


def test_downloads_are_counted_and_none_is_made(llamas, tmp_path):
    files = {file.name: file.read_bytes() for file in llamas[0].iterdir() if file.is_file()}
    with HubServer() as hub:
        hub.add("owner/model", files)
        recipe = written(tmp_path, linear("owner/model", llamas[1]))
        env = hub.env(tmp_path / "home")
        data = json.loads(shown("check", recipe, "--json", env=env)[0])
        assert data["needs"]["download"] == len(files[WEIGHTS])
        assert data["needs"]["cache"].startswith(str(tmp_path / "home"))
        (traced,) = json.loads(
            shown("plan", recipe, "--trace", "model.norm.weight", "--json", env=env)[0]
        )
        leaf = traced["from"]["from"][0]
        header = 8 + int.from_bytes(files[WEIGHTS][:8], "little")
        start, end = leaf["bytes"]
        assert header <= start < end <= len(files[WEIGHTS])
        # Headers came by ranges, the weights did not.
        assert hub.sent(r"GET .*safetensors$") < len(files[WEIGHTS]) / 10


# --- every mistake at once ---------------------------------------------------------------------


def test_values_are_checked_before_any_tensor_is_planned(llamas, tmp_path):
    own = [{"weight": float("nan"), "density": -0.5}, {"weight": "heavy", "density": [1, 1.5]}]
    models = [{"model": str(m), "parameters": p} for m, p in zip(llamas[1:], own, strict=True)]
    recipe = {"merge_method": "ties", "base_model": str(llamas[0]), "models": models}
    recipe["parameters"] = {"normalize": 2}
    found = checking.check(written(tmp_path, recipe))
    assert found.exit_code == 4
    assert [(error.path[-1], error.what) for error in found.errors] == [
        ("density", "density is a share of a tensor's elements, got -0.5"),
        ("weight", "expected a number, got nan"),
        ("weight", "expected a number, got 'heavy'"),
        ("normalize", "expected true or false, got 2"),
    ]
    lines = [error.line for error in found.errors]
    assert lines == sorted(lines)
    for each in own:
        each["weight"], each["density"] = 1, 1.5
    recipe["parameters"] = {}
    (warning, _) = checking.check(recipe).notes
    assert warning.warning
    assert warning.what.endswith("got 1.5, which counts as 1")


def test_names_that_are_no_models_say_what_may_be_meant(llamas, tmp_path):
    recipe = {**linear(*llamas[:2]), "tokenizer": {"source": "unoin"}}
    found = checking.check(recipe, offline=True)
    assert 'unoin is taken for a model — did you mean "union"?' in [e.what for e in found.errors]
    url = checking.check(linear("https://huggingface.co/owner/name/tree/main", llamas[0]))
    assert [error.fix for error in url.errors] == ["Write owner/name."]


# --- strictness ----------------------------------------------------------------------------------


def test_strict_makes_errors_of_warnings(models, llamas, tmp_path):
    other = models("llama", seed=5, rope_theta=500000.0)
    recipe = written(tmp_path, mixture(llamas[0], llamas[1], other))
    assert "warning: " in shown("check", recipe)[1]
    assert "error: " in shown("check", recipe, "--strict", code=4)[1]
    _, err = shown("build", recipe, "--strict", "-o", tmp_path / "out", code=4)
    assert "rope_theta" in err
    assert not (tmp_path / "out").exists()
    fine = written(tmp_path, mixture(*llamas))
    assert shown("check", fine, "--strict")[1] == ""


# --- origins -------------------------------------------------------------------------------------


def test_a_trace_leads_to_the_bytes(llamas, tmp_path):
    recipe = written(tmp_path, mixture(*llamas))
    name = "model.layers.2.block_sparse_moe.experts.1.w1.weight"
    (found,) = json.loads(shown("plan", recipe, "--trace", name, "--json")[0])
    leaf = found["from"]
    start, end = leaf["bytes"]
    data = Path(leaf["file"]).read_bytes()[start:end]
    expected = load_file(llamas[2] / WEIGHTS)["model.layers.2.mlp.gate_proj.weight"]
    assert data == expected.numpy().tobytes()
    assert leaf["reads"] == "model.layers.2.mlp.gate_proj.weight"
    tree, _ = shown("plan", recipe, "--trace", "*.experts.?.w2.weight")
    assert tree.count("float32") == 2 * 2 * 4, "output and input, two experts, four layers"


def test_a_trace_of_nothing_names_what_is_near(llamas):
    plan = moeforge.plan(linear(*llamas))
    with pytest.raises(PlanError, match=r"did you mean \"model.norm.weight\""):
        origins.traced(plan, "model.norm.wieght")


def test_what_is_left_out_is_told_by_ranges(llamas, tmp_path):
    recipe = {"slices": [{"sources": [{"model": str(llamas[0]), "layer_range": [0, 2]}]}]}
    plan = moeforge.plan(recipe)
    (group,) = origins.groups(plan.left_out)
    assert group["tensors"] == len(plan.left_out) == 18
    assert group["where"] == ["model.layers.2-3"]
    out, _ = shown("plan", written(tmp_path, recipe))
    assert "18 tensors" in out
    assert "model.layers.2-3" in out


def test_ranges():
    assert origins.spans([3, 1, 2, 7, 9, 8]) == "1-3, 7-9"
    left_out = {Read("m", f"h.{i}.x"): "why" for i in (0, 1, 5)} | {Read("m", "wte"): "why"}
    (group,) = origins.groups(left_out)
    assert group["where"] == ["h.0-1, 5", "wte"]


def test_brackets_in_names_are_no_markup(models, llamas, tmp_path):
    odd = models.copy(llamas[0], "[bold]a[b]")
    other = models("llama", seed=5, rope_theta=500000.0)
    recipe = written(tmp_path, mixture(llamas[1], odd, other))
    trace = ("plan", recipe, "--trace", "*layers.0.*experts.0.w1*")
    out = ("check", recipe, "-o", tmp_path / "[bold]a[b]" / "out")
    shown("check", recipe, "-o", tmp_path / "[" / "x]" / "out")
    for command in (("check", recipe), ("plan", recipe), trace, ("inspect", odd), out):
        text = shown(*command)[0].replace("│", "")
        assert "[bold]a[b]" in "".join(text.split()), command


# --- prompts and tokenizers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "warned"),
    [
        (["sort a list of numbers", "write a loop in PYTHON please"], True),
        (["sort a list of numbers", "erzähle mir eine Geschichte"], False),
    ],
)
def test_prompts_that_are_nearly_the_same_are_warned_of(theirs, warned, llamas):
    mine = ["sort a list of numbers", "write a loop in python"]
    experts = [
        {"source_model": str(llamas[1]), "positive_prompts": mine},
        {"source_model": str(llamas[2]), "positive_prompts": theirs},
    ]
    report = checking.check(mixture(llamas[0], *experts, gate_mode="fitted"))
    found = [note for note in report.notes if "same: the router" in note.what]
    assert bool(found) == warned
    if warned:  # nine words are in both, "please" in one
        assert found[0].what.startswith(
            "90% of the words in its prompts and in those of experts[0]"
        )
        assert found[0].path == ("experts", 1)


def test_padding_rows_are_said_and_missing_rows_warned_of(models, llamas, tmp_path):
    folder = tmp_path / "few"
    shutil.copytree(llamas[0], folder)
    report = checking.check(linear(folder))
    tokens = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    assert (report.prepared.padding.rows, report.prepared.padding.tokens) == (300, tokens)
    out, _ = shown("check", written(tmp_path, linear(folder)))
    assert f"300 rows for {tokens} tokens; {300 - tokens} padding rows are kept" in out
    narrow = models("llama", seed=9, vocab_size=tokens - 5)
    (warning,) = checking.check(linear(narrow)).notes
    assert warning.warning
    assert f"has {tokens} tokens, its embeddings have {tokens - 5} rows" in warning.what


def test_comparison_of_nothing_is_none():
    assert compatibility.compare([]) is None

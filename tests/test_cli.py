"""The commands, as a user runs them: real processes, real tiny models."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import warm
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moeforge.version import __version__

WEIGHTS = "model.safetensors"
HEAVY = {"torch", "transformers", "pydantic"}


def moeforge(*arguments, cwd=None, code=0, python=()):
    if arguments[0] == "build":
        arguments = (*arguments, "--no-verify")  # which takes seconds; test_verify.py is about it
    env = {**os.environ, "COLUMNS": "100"}
    if python:
        command = [sys.executable, *python, "-m", "moeforge", *map(str, arguments)]
        run = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)
    else:
        run = warm.moeforge(*arguments, cwd=cwd, env=env)
    assert run.returncode == code, run.stderr
    assert "Traceback" not in run.stderr
    return run


def imported(*arguments, **how):
    """Top-level packages that a command imports."""
    run = moeforge(*arguments, python=("-X", "importtime"), **how)
    lines = [line for line in run.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def recipe(folder, name, data):
    path = folder / f"{name}.yml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture
def merge(llamas, tmp_path):
    inputs = [{"model": str(folder), "parameters": {"weight": 1}} for folder in llamas]
    return recipe(tmp_path, "soup", {"merge_method": "linear", "models": inputs})


@pytest.fixture
def stack(llamas, tmp_path):
    spans = [(llamas[0], [0, 3]), (llamas[1], [1, 4])]
    slices = [{"sources": [{"model": str(m), "layer_range": span}]} for m, span in spans]
    return recipe(tmp_path, "tower", {"slices": slices, "dtype": "bfloat16"})


@pytest.fixture
def moe(llamas, tmp_path):
    (tmp_path / "words.txt").write_text("one two three\n\nfour five six")
    experts = [
        {"source_model": str(llamas[1]), "positive_prompts": ["1 2 3", "4 5 6"]},
        {"source_model": str(llamas[2]), "prompts_file": "words.txt"},
    ]
    return recipe(tmp_path, "mixture", {"base_model": str(llamas[0]), "experts": experts})


# --- build ---------------------------------------------------------------------------------------


def test_a_merge_lands_in_a_folder_named_like_its_recipe(merge, llamas, tmp_path):
    (tmp_path / "here").mkdir()
    run = moeforge("build", merge, cwd=tmp_path / "here")
    out = tmp_path / "here" / "soup"
    assert sorted(os.listdir(tmp_path / "here")) == ["soup"]
    assert {"config.json", "README.md", "moeforge.yml", "tokenizer.json", WEIGHTS} <= set(
        os.listdir(out)
    )
    assert (out / "moeforge.yml").read_text() == merge.read_text()
    result, *inputs = (load_file(folder / WEIGHTS) for folder in (out, *llamas))
    for name, tensor in result.items():
        mean = sum(one[name].double() for one in inputs) / 3
        assert torch.allclose(tensor.double(), mean, atol=1e-6)
    assert run.stderr == ""
    thousands = round(sum(tensor.numel() for tensor in result.values()) / 1000)
    assert run.stdout.startswith(f"soup: LlamaForCausalLM, {thousands} k parameters, ")


def test_a_stack_is_the_layers_that_it_names(stack, llamas, tmp_path):
    moeforge("build", stack, "-o", tmp_path / "out", "--verbose")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
    result, first, second = (load_file(f / WEIGHTS) for f in (tmp_path / "out", *llamas[:2]))
    name = "model.layers.{}.mlp.up_proj.weight"
    for number, (source, layer) in enumerate(
        [(first, 0), (first, 1), (first, 2), (second, 1), (second, 2), (second, 3)]
    ):
        expected = source[name.format(layer)].bfloat16()
        assert torch.equal(result[name.format(number)], expected)
    assert torch.equal(result["lm_head.weight"], second["lm_head.weight"].bfloat16())
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_mixture_is_built_and_described_as_json(moe, llamas, tmp_path):
    run = moeforge("build", moe, "-o", tmp_path / "out", "--json")
    data = json.loads(run.stdout)
    weights = load_file(tmp_path / "out" / WEIGHTS)
    assert data["folder"] == str(tmp_path / "out")
    assert data["kind"] == "moe"
    assert data["bytes"] == sum(tensor.nbytes for tensor in weights.values())
    # Two experts per token of two: every parameter is active.
    assert data["parameters"] == data["active_parameters"]
    assert data["parameters"] == sum(tensor.numel() for tensor in weights.values())
    expert = load_file(llamas[2] / WEIGHTS)["model.layers.3.mlp.down_proj.weight"]
    (name,) = (n for n in weights if "layers.3." in n and n.endswith(".experts.1.w2.weight"))
    assert torch.equal(weights[name], expert)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "MixtralForCausalLM"


def test_speed_options_do_not_change_a_byte_and_quiet_is_silent(merge, tmp_path):
    """Files may be cut elsewhere; each tensor stays the same bytes."""
    options = ["--threads", "1"], ["--threads", "3", "--memory", "400MB", "--shard-size", "100kB"]
    results = []
    for number, extra in enumerate(options):
        out = tmp_path / str(number)
        run = moeforge("build", merge, "-o", out, "-q", *extra)
        assert (run.stdout, run.stderr) == ("", "")
        tensors = {}
        for file in out.glob("*.safetensors"):
            tensors.update(load_file(file))
        results.append(tensors)
    first, second = results
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    index = json.loads((tmp_path / "1" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert files == {file.name for file in (tmp_path / "1").glob("*.safetensors")}
    assert len(files) > 1
    assert index["weight_map"].keys() == first.keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "1").state_dict()
    assert all(torch.equal(loaded[name], first[name]) for name in first)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--shard-size", "big", "is not a size"),
        ("--memory", "0GB", "at least one byte"),
        ("--threads", "0", "threads"),
        ("--device", "abacus", "--device abacus cannot be used"),
    ],
)
def test_options_that_mean_nothing_are_refused(option, value, said, merge, tmp_path):
    code = 5 if option == "--device" else 2
    run = moeforge("build", merge, "-o", tmp_path / "out", option, value, code=code)
    assert said in run.stderr
    assert sorted(os.listdir(tmp_path)) == ["soup.yml"]


def test_errors_in_json_are_on_stdout_too(tmp_path):
    path = recipe(tmp_path, "wrong", {"models": [], "merge_method": "liner"})
    run = moeforge("build", path, "--json", code=2)
    errors = json.loads(run.stdout)["errors"]
    assert [(error["path"], error["line"]) for error in errors] == [
        (["merge_method"], 1),
        (["models"], 2),
    ]
    assert run.stderr.count("error: line") == 2


def test_an_interrupted_build_leaves_nothing(moe, tmp_path):
    """SIGINT as soon as the working folder is there, while the base is being run."""
    before = sorted(os.listdir(tmp_path))
    process = start_build(moe, tmp_path / "out")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "stopped; nothing was published\n"
    assert sorted(os.listdir(tmp_path)) == before


def start_build(recipe_path, out):
    """Start a build and wait until its working folder is there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "moeforge", "build", recipe_path, "-o", out],
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs these tests in the background has had Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not out.with_name(f".{out.name}.moeforge").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


def test_a_killed_build_publishes_nothing_and_the_next_one_works(moe, tmp_path):
    process = start_build(moe, tmp_path / "out")
    process.kill()
    process.communicate()
    assert not (tmp_path / "out").exists()
    moeforge("build", moe, "-o", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / ".out.moeforge").exists()


def test_a_second_build_of_the_same_output_is_refused(moe, tmp_path):
    first = start_build(moe, tmp_path / "out")
    time.sleep(0.2)  # the folder is made just before it is locked
    second = moeforge("build", moe, "-o", tmp_path / "out", code=5)
    assert "another build is making" in second.stderr
    assert first.wait(timeout=60) == 0
    assert (tmp_path / "out" / "config.json").exists()


# --- looking only --------------------------------------------------------------------------------


def test_check_says_yes_and_writes_nothing(merge, tmp_path):
    run = moeforge("check", merge, cwd=tmp_path)
    assert f"{merge}: fine" in run.stdout
    assert run.stderr == ""
    assert os.listdir(tmp_path) == ["soup.yml"]
    data = json.loads(moeforge("check", merge, "--json").stdout)
    assert (data["errors"], data["notes"], data["architectures"]) == ([], [], {})


def test_check_says_no_with_the_exit_code_of_its_kind(llamas, tmp_path):
    model = {"model": str(llamas[0]), "parameters": {"t": 1}}
    path = recipe(tmp_path, "wrong", {"merge_method": "linear", "models": [model]})
    run = moeforge("check", path, code=4)
    assert run.stdout == ""
    assert "note: " not in run.stderr, "notes wait until there are no errors"
    assert "linear needs the parameter weight" in run.stderr
    data = json.loads(moeforge("check", path, "--json", code=4).stdout)
    (error,) = data["errors"]
    assert error["path"] == ["models", 0]
    assert error["line"] == 3


def test_plan_says_what_build_makes(stack, moe, tmp_path):
    data = json.loads(moeforge("plan", stack, "--json", "--shard-size", "300kB").stdout)
    moeforge("build", stack, "-o", tmp_path / "out", "--shard-size", "300kB")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    assert data["bytes_written"] == sum(file.stat().st_size for file in files)
    made = {name: (t.dtype, t.shape, f.name) for f in files for name, t in load_file(f).items()}
    planned = {
        t["name"]: (getattr(torch, t["dtype"]), torch.Size(t["shape"]), t["file"])
        for t in data["tensors"]
    }
    assert planned == made
    assert data["config"] == json.loads((tmp_path / "out" / "config.json").read_text())
    shown = moeforge("plan", moe).stdout
    for word in ("MixtralForCausalLM", "2 per token, gate mode fitted", "parameters", "memory"):
        assert word in shown


def test_plan_counts_the_prompts_that_routers_are_made_from(llamas, tmp_path):
    """Four megabytes of text more are two million tokens more, at two bytes for each."""
    needed = {}
    for method in ("ridge", "logistic"):
        for length in (2_000_000, 4_000_000):
            experts = []
            for folder, letter in zip(llamas[1:], "ab", strict=True):
                (tmp_path / f"{letter}.txt").write_text(letter * length)
                experts.append({"source_model": str(folder), "prompts_file": f"{letter}.txt"})
            parameters = {"method": method}
            data = {"base_model": str(llamas[0]), "experts": experts, "gate_parameters": parameters}
            path = recipe(tmp_path, f"{method}-{length}", data)
            found = json.loads(moeforge("plan", path, "--json").stdout)["peak_memory"]
            needed[method, length] = found
    tokens = 2 * 2_000_000 / 2  # more in each recipe with twice the text, at two bytes per token
    float64, floats32 = 8 * 64, 2 * 4 * 64
    assert needed["ridge", 4_000_000] - needed["ridge", 2_000_000] == tokens * floats32
    more = needed["logistic", 4_000_000] - needed["logistic", 2_000_000]
    assert more == tokens * (floats32 + float64)


def test_inspect_tells_what_a_checkpoint_is(llamas):
    data = json.loads(moeforge("inspect", llamas[0], "--json").stdout)
    tensors = load_file(llamas[0] / WEIGHTS)
    assert data["architecture"] == "LlamaForCausalLM"
    assert data["tensors"] == len(tensors)
    assert data["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert data["dtypes"] == {"float32": data["parameters"]}
    assert (data["layers"], data["hidden_size"], data["tied_head"]) == (4, 64, False)
    assert "mixtral" in data["moe_families"]
    assert "LlamaForCausalLM" in moeforge("inspect", llamas[0]).stdout
    run = moeforge("inspect", llamas[0] / "nope", code=3)
    assert run.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("shelf", "word"), [("methods", "slerp"), ("families", "qwen3_moe"), ("gates", "fitted")]
)
def test_show_lists_a_shelf(shelf, word):
    rows = json.loads(moeforge("show", shelf, "--json").stdout)
    names = [row["name"] for row in rows]
    assert word in names
    shown = moeforge("show", shelf).stdout
    assert all(name in shown for name in names)


def test_an_unknown_shelf_is_answered_with_the_known_ones():
    run = moeforge("show", "method", code=2)
    text = " ".join(run.stderr.split())
    assert 'did you mean "methods"?' in text
    assert "families, gates" in text


def test_version_and_help():
    assert moeforge("--version").stdout == f"moeforge {__version__}\n"
    shown = moeforge("--help").stdout
    for command in ("build", "check", "plan", "inspect", "show", "push"):
        assert command in shown
    assert "--overwrite" in moeforge("build", "--help").stdout


def test_no_word_of_the_help_is_taken_for_markup():
    """What stands in square brackets is not shown."""
    import typer

    from moeforge.cli import app

    groups = [typer.main.get_command(app)]
    helps = {}
    for group in groups:
        for name, command in group.commands.items():
            groups += [command] if hasattr(command, "commands") else []
            helps |= {f"{name} {param.name}": param.help for param in command.params}
    assert len(helps) > 80
    assert not {name: text for name, text in helps.items() if "[" in (text or "")}


# --- what is not waited for ----------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    assert not HEAVY & imported("--help")


@pytest.mark.parametrize("kind", ["merge", "moe", "stack"])
def test_check_imports_no_torch(kind, request):
    assert not {"torch", "transformers"} & imported("check", request.getfixturevalue(kind))


def test_plan_of_a_stack_imports_no_torch(stack):
    assert "torch" not in imported("plan", stack)


def test_builds_without_routers_draw_nothing(merge, tmp_path):
    assert "matplotlib" not in imported("build", merge, "-o", tmp_path / "out")

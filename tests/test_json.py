"""JSON for scripts: every command prints what docs/json.md says, and nothing else."""

import inspect
import json
import subprocess
import sys

import pytest
import tiny
from documented import hold, sections
from typer.testing import CliRunner

from moeforge.cli import app, prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, a merge and a mixture that is built of them."""
    root = tmp_path_factory.mktemp("json")
    models = tiny.Maker(root)
    one, two = (str(models("llama", seed=seed, num_hidden_layers=2)) for seed in (1, 2))
    (root / "text.txt").write_text("the quick brown fox " * 30, encoding="utf-8")
    merge = {"merge_method": "linear", "models": [{"model": m} for m in (one, two)]}
    merge["parameters"] = {"weight": 1}
    experts = [{"source_model": m, "positive_prompts": ["one", "two"]} for m in (one, two)]
    mixture = {"base_model": one, "gate_mode": "random", "experts": experts}
    for name, recipe in {"merge": merge, "mixture": mixture}.items():
        (root / f"{name}.yml").write_text(json.dumps(recipe), encoding="utf-8")
    (root / "one").symlink_to(one)
    (root / "two").symlink_to(two)
    return root


OUTPUTS = {
    "check": ["check mixture.yml --explain", "check merge.yml", "check nothing.yml"],
    "plan": ["plan mixture.yml", "plan merge.yml"],
    "plan --trace": ["plan merge.yml --trace *.mlp.*"],
    "build": ["build merge.yml -o merge --no-verify", "build mixture.yml -o mixture"],
    "inspect": ["inspect one", "inspect mixture"],
    "show methods": ["show methods"],
    "show families": ["show families"],
    "show gates": ["show gates"],
    "new": ["new soup -m one -m two -o new.yml"],
    "new --list": ["new --list"],
    "card": ["card merge"],
    "verify": ["verify mixture"],
    "rebuild": ["rebuild merge -o again --no-verify"],
    "diff": ["diff one two", "diff one mixture", "diff one one"],
    "eval": ["eval one --text text.txt"],
    "error": ["plan nothing.yml", "build merge.yml", "show shelves", "check", "diff one", "buidl"],
}
"""Commands by the table of their output, in an order that works. The tests of tune, route, push,
prompts and surgery hold their outputs to the tables themselves."""
ELSEWHERE = {"tune", "route", "push", "prompts", "prompts select", "prompts cluster", "finding"}
ELSEWHERE |= {"extract", "experts", "upcycle"}


def test_every_command_prints_what_is_documented_and_nothing_else(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert sections().keys() == OUTPUTS.keys() | ELSEWHERE
    for table, commands in OUTPUTS.items():
        for command in commands:
            words = [*command.split(), "--json"]
            run = CliRunner().invoke(app, words)
            assert "Traceback" not in run.output, command
            hold(table, json.loads(run.stdout))
            assert run.exit_code == 0 or table in ("check", "diff", "error"), (
                f"{command}: {run.output}"
            )


def test_every_command_has_json_and_a_table():
    known = {c.name or c.callback.__name__: c.callback for c in app.registered_commands}
    for c in prompts.app.registered_commands:
        known[f"prompts {c.name or c.callback.__name__}"] = c.callback
    for name, command in known.items():
        if name == "schema":  # which is JSON, whatever is asked for
            continue
        assert "as_json" in inspect.signature(command).parameters, name
        assert any(table.split(" -")[0].startswith(name) for table in sections()), name


@pytest.mark.parametrize(
    ("table", "data"),
    [
        ("new", {"kind": "soup", "recipe": "a", "schema": "b", "more": 1}),
        ("new", {"kind": "soup", "recipe": "a"}),
        ("new", {"kind": "soup", "recipe": "a", "schema": None}),
        ("error", {"errors": [{"what": "x"}]}),
        ("new --list", {}),
    ],
)
def test_what_is_not_documented_is_noticed(table, data):
    with pytest.raises(AssertionError):
        hold(table, data)


def test_any_text_can_be_printed_into_any_pipe(folder):
    """And no control codes into it, on machines where typer thinks that somebody looks."""
    run = subprocess.run(
        [sys.executable, "-m", "moeforge", "--help"],
        capture_output=True,
        env={"PATH": "", "PYTHONIOENCODING": "ascii", "GITHUB_ACTIONS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert b"\x1b" not in run.stdout
    assert b"Usage: " in run.stdout

"""The documents: their commands run, their examples plan, their tables name what there is."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from pages import BLOCKS, PAGES, ROOT
from typer.main import get_command
from typer.testing import CliRunner

import moeforge
from moeforge import catalog
from moeforge.cli import app


def named(found):
    return [
        pytest.param(block, id=f"{block.page.name}-{number}") for number, block in enumerate(found)
    ]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder as readers of the documents have it before them."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "quickstart").symlink_to(ROOT / "recipes" / "quickstart")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


@pytest.mark.parametrize("block", named(b for b in BLOCKS if b.language == "yaml" and not b.waits))
def test_recipes_plan_or_have_the_mistakes_that_they_show(block, here):
    kind = block.mark.partition(",")[0]
    assert kind in ("example: plan", "example: error"), f"{block.page.name}:{block.line}: no mark"
    (here / "example.yml").write_text(block.text)
    report = moeforge.check(here / "example.yml")
    assert bool(report.errors) == (kind == "example: error"), report.errors


def run(commands):
    """Run commands; yield the exit code and output of each."""
    for words in commands:
        done = CliRunner().invoke(app, words)
        yield done.exit_code, done.output


ALONE = """
import json, sys, transformers  # here, so that no command starts a process of its own for it
from test_docs import run
json.dump(list(run(json.load(sys.stdin))), sys.stdout)
"""


def with_hub(commands):
    """Do the same in a process of its own, for huggingface_hub reads its settings once."""
    with HubServer() as server:
        server.user = "you"
        home = Path("home").absolute()
        here = {"COLUMNS": "100", "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", ALONE],
            env=server.env(home, token=server.token, **here),
            input=json.dumps(commands),
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


RUN = [page for page in PAGES if any(b.page == page and b.runs for b in BLOCKS)]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_what_a_page_says_to_type_runs(page, here):
    """From top to bottom, in one folder; what stands below a command is what it prints."""
    torch.set_num_threads(1)  # more of them wait for each other where others use the cores
    for block in BLOCKS:
        if block.page != page:
            continue
        where = f"{page.name}:{block.line}"
        if block.file:
            (here / block.file).write_text(block.text)
        if block.waits:
            (here / "example.yml").write_text(block.text)
            assert not moeforge.check(here / "example.yml").errors, where
        if not block.runs:
            continue
        if block.language == "python":
            exec(compile(block.text, where, "exec"), {})
            continue
        commands = list(block.commands())
        assert commands, f"{where}: no line begins with $"
        typed = [shlex.split(command) for command, _ in commands]
        assert all(program == "moeforge" for program, *_ in typed), where
        results = (with_hub if block.asks_the_hub else run)([words for _, *words in typed])
        for (command, wanted), (code, output) in zip(commands, results, strict=True):
            assert code == block.exit_code, f"{where}: {command}\n{output}"
            printed = " ".join(output.split())
            for line in wanted:
                assert line in printed, f"{where}: {command} does not print {line!r}\n{output}"


def test_every_command_runs_or_says_why_not():
    allowed = r"usage(: exit \d|: hub)?|not run: .{8,}|quickstart command|test command"
    for block in BLOCKS:
        if block.is_command:
            where = f"{block.page.name}:{block.line} has commands and no mark, see tests/pages.py"
            assert re.fullmatch(allowed, block.mark), where


def test_documents_name_every_entry_of_every_shelf():
    text = (ROOT / "docs" / "recipes.md").read_text()
    for shelf in ("methods", "families", "gates"):
        for name in catalog.names(shelf):
            assert f"`{name}`" in text, f"docs/recipes.md does not mention {shelf}/{name}"


def leaves(command, path="moeforge"):
    """Yield every command by what is typed for it."""
    if not hasattr(command, "commands"):
        yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from leaves(inner, f"{path} {name}")


def test_documents_name_every_command_and_flag():
    """By hand: what the site generates says what a flag is, not when one wants it."""
    text = "".join(page.read_text() for page in PAGES)
    every = dict(leaves(get_command(app)))
    assert len(every) > 12
    for path, command in every.items():
        assert path in text
        for parameter in command.params:
            for flag in (*parameter.opts, *parameter.secondary_opts):
                if flag.startswith("--"):
                    assert re.search(rf"{flag}(?![\w-])", text), f"no page mentions {path} {flag}"


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"

"""The documents: their commands run, their examples plan, their tables name what there is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import moeforge
from moeforge import catalog

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language, marker=""):
    pattern = rf"{re.escape(marker)}\n```{language}\n(.*?)```"
    return re.findall(pattern, page.read_text(), re.DOTALL)


def yaml_examples():
    return [
        pytest.param(text, id=f"{page.name}-{number}")
        for page in PAGES
        for number, text in enumerate(blocks(page, "yaml", "<!-- example: plan -->"))
    ]


@pytest.mark.parametrize("text", yaml_examples())
def test_examples_plan(text, tmp_path):
    (tmp_path / "quickstart").symlink_to(ROOT / "recipes" / "quickstart")
    (tmp_path / "example.yml").write_text(text)
    report = moeforge.check(tmp_path / "example.yml")
    assert not report.errors


def test_every_yaml_block_is_an_example():
    for page in PAGES:
        every = blocks(page, "yaml")
        assert len(every) == len(blocks(page, "yaml", "<!-- example: plan -->")), page


@pytest.mark.parametrize("page", ["README.md", "docs/proof.md"])
def test_usage_commands_run(page, tmp_path):
    """Every `moeforge` line of the page's usage block, in a folder with the recipes."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (block,) = blocks(ROOT / page, "console", "<!-- usage -->")
    commands = [
        line[2:].split(" #")[0].strip() for line in block.splitlines() if line.startswith("$")
    ]
    assert len(commands) >= 4
    for command in commands:
        words = command.split()
        assert words[0] == "moeforge"
        run = subprocess.run(
            [sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True
        )
        assert run.returncode == 0, f"{command}: {run.stderr}"


def test_documents_name_every_entry_of_every_shelf():
    text = (ROOT / "docs" / "recipes.md").read_text()
    for shelf in ("methods", "families", "gates"):
        for name in catalog.names(shelf):
            assert f"`{name}`" in text, f"docs/recipes.md does not mention {shelf}/{name}"


def test_documents_name_every_command_and_flag():
    text = "".join(page.read_text() for page in PAGES)
    commands = "build check plan inspect show push eval route tune verify rebuild diff"
    for command in commands.split():
        assert f"moeforge {command}" in text
        usage = subprocess.run(
            [sys.executable, "-m", "moeforge", command, "--help"], capture_output=True, text=True
        ).stdout
        for flag in set(re.findall(r"(?<!\w)--[a-z][a-z-]+", usage)) - {"--help"}:
            assert flag in text, f"no page mentions {command} {flag}"


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"

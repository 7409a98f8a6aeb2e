"""Imports go down only, and light commands import nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moeforge

ROOT = Path(moeforge.__file__).parent

FLOORS = [
    {"errors", "version", "sealed", "system", "bars", "shown"},
    {
        "tensors",
        "markdown",
        "catalog",
        "configs",
        "dense",
        "vocabulary",
        "workers",
        "texts",
        "finite",
        "hashes",
        "ranks",
        "kernels",
    },
    {"recipe", "expressions", "plans", "sources", "forward", "module_weights", "routing"},
    {"methods", "families", "gates"},
    {"planners", "engine", "output", "proof", "targets"},
    {
        "prepare",
        "checking",
        "weights",
        "mixing",
        "routers",
        "evaluate",
        "tuning",
        "tables",
        "eval_tables",
        "fit_tables",
        "prompting",
        "build_report",
        "vouch",
        "sharing",
        "proof_tables",
        "forge",
        "rebuilding",
        "publishing",
        "starter",
        "showing",
        "surgery",
    },
    {"cli", "__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
DOORS = {
    ("configs", "dense"),
    ("texts", "vocabulary"),
    ("tensors", "finite"),
    ("module_weights", "forward"),
    ("sources", "plans"),
    ("expressions", "plans"),
    ("output", "engine"),
    ("output", "proof"),
    ("weights", "mixing"),
    ("weights", "routers"),
    ("weights", "evaluate"),
    ("mixing", "routers"),
    ("prepare", "checking"),
    ("checking", "forge"),
    ("checking", "tables"),
    ("prepare", "routers"),
    ("prepare", "forge"),
    ("routers", "forge"),
    ("evaluate", "build_report"),
    ("prepare", "build_report"),
    ("prepare", "tables"),
    ("tables", "build_report"),
    ("tuning", "build_report"),
    ("build_report", "forge"),
    ("tables", "eval_tables"),
    ("tables", "fit_tables"),
    ("tables", "tuning"),
    ("prepare", "prompting"),
    ("weights", "prompting"),
    ("prompting", "forge"),
    ("prepare", "tuning"),
    ("weights", "tuning"),
    ("prepare", "vouch"),
    ("vouch", "forge"),
    ("routers", "sharing"),
    ("sharing", "forge"),
    ("prepare", "rebuilding"),
    ("forge", "rebuilding"),
    ("forge", "surgery"),
    ("tuning", "forge"),
    ("checking", "showing"),
    ("forge", "showing"),
    ("rebuilding", "showing"),
    ("tables", "showing"),
    ("fit_tables", "showing"),
    ("proof_tables", "showing"),
    ("tuning", "showing"),
    ("cli", "__main__"),
}
"""The only doors between rooms of one floor, from the used to the user."""


def room_of(path):
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported(path):
    """Yield the modules of moeforge that a file imports for its own use."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moeforge"):
            parts = node.module.split(".")
            if len(parts) > 1:
                yield parts[1]
            else:
                yield from (alias.name for alias in node.names)


FILES = [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    room = room_of(path)
    for other in imported(path):
        if other in (room, "__version__"):
            continue
        assert other in LEVEL, f"{other} has no floor"
        lower = LEVEL[other] < LEVEL[room]
        assert lower or (other, room) in DOORS, f"{path} ({room}) imports {other}"


def test_every_room_has_a_floor_and_every_file_says_what_it_owns():
    assert {room_of(path) for path in FILES} == set(LEVEL)
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_files_stay_readable():
    long = {str(p): n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def modules_after(code):
    script = f"import sys\n{code}\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_the_library_is_light_to_import():
    assert not {"torch", "transformers", "pydantic"} & modules_after("import moeforge")
    loaded = modules_after("from moeforge import forge")
    assert not {"torch", "transformers", "huggingface_hub"} & loaded


def test_the_public_names_stay_functions_whatever_was_imported():
    code = "from moeforge import forge, plans, tables; import moeforge\n"
    assert modules_after(code + "assert all(map(callable, (moeforge.build, moeforge.plan)))")
    taken = {path.stem for path in ROOT.iterdir()} & set(moeforge.__all__)
    assert not taken, "a module of that name would hide the function"

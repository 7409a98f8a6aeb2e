"""What is said of errors that nobody foresaw: one line, never a traceback unless asked for."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
import warm
import yaml

from moeforge.cli import unexpected
from moeforge.errors import BuildError, SourceError, out_of_memory

BROKEN = """\
import sys
import moeforge.prepare
def broken(*args, **kwargs):
    raise {error}
moeforge.prepare.recipes.load = broken
import moeforge.checking, moeforge.forge
moeforge.checking.recipes.load = broken
sys.argv = ["moeforge", *sys.argv[1:]]
from moeforge.cli import main
main()
"""


def run(*arguments, code, error=None, **env):
    """A command; where `error` is given, with a mistake in it that raises that."""
    env = {**os.environ, **env}
    if error:
        command = [sys.executable, "-c", BROKEN.format(error=error), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
    else:
        done = warm.moeforge(*arguments, env=env)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def recipe(llamas, tmp_path):
    models = [{"model": str(folder), "parameters": {"weight": 1}} for folder in llamas]
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    return path


COMMANDS = ["build", "check", "plan"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_of_moeforge_is_one_line(command, recipe):
    done = run(command, recipe, code=1, error="KeyError('layers')")
    (line, fix) = done.stderr.strip().splitlines()
    assert line.startswith("error: KeyError: 'layers' (moeforge/")
    assert "mistake in moeforge" in fix
    assert f"moeforge --debug {command}" in fix
    assert done.stdout == ""


def test_debug_shows_the_traceback(recipe):
    for done in (
        run("--debug", "check", recipe, code=1, error="KeyError('layers')"),
        run("check", recipe, code=1, error="KeyError('layers')", MOEFORGE_DEBUG="1"),
    ):
        assert "Traceback (most recent call last)" in done.stderr
        assert "in broken" in done.stderr
        assert "error: KeyError: 'layers'" in done.stderr
    quiet = run("check", recipe, code=1, error="KeyError('layers')", MOEFORGE_DEBUG="0")
    assert "Traceback" not in quiet.stderr


def test_debug_shows_where_a_foreseen_error_comes_from(tmp_path):
    (tmp_path / "recipe.yml").write_text("merge_method: liner\nmodels: []\n")
    done = run("--debug", "plan", tmp_path / "recipe.yml", code=2)
    assert done.stderr.startswith("Traceback")
    assert 'did you mean "linear"?' in done.stderr


def test_json_stays_json(recipe):
    done = run("check", recipe, "--json", code=1, error="KeyError('layers')")
    (error,) = json.loads(done.stdout)["errors"]
    assert error["what"].startswith("KeyError: 'layers'")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ("MemoryError()", 5, "there is not enough memory"),
        (
            "RuntimeError('[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: "
            "can\\'t allocate memory: you tried to allocate 4 bytes.')",
            5,
            "there is not enough memory",
        ),
        (f"OSError({errno.ENOSPC}, 'No space left on device', '/x/config.json')", 5, "/x/config"),
        (f"OSError({errno.EROFS}, 'Read-only file system', '/x/y')", 5, "cannot be written to"),
        (f"OSError({errno.EMFILE}, 'Too many open files', '/x')", 5, "ulimit -n"),
        ("PermissionError(13, 'Permission denied', '/x/lock')", 5, "/x/lock: Permission denied"),
        ("RuntimeError('shape mismatch')", 1, "mistake in moeforge"),
    ],
)
def test_errors_of_system_and_libraries_are_translated(error, code, said, recipe):
    done = run("check", recipe, code=code, error=error)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_what_torch_says_when_memory_is_short_is_known():
    """The text is torch's own, of an allocation that no machine can make."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    assert isinstance(unexpected.translated(caught.value), BuildError)
    assert not out_of_memory(RuntimeError("shapes differ"))


def test_what_safetensors_says_is_translated(tmp_path):
    from safetensors import SafetensorError, safe_open

    (tmp_path / "x.safetensors").write_bytes(b"\x10" * 20)
    with pytest.raises(SafetensorError) as caught, safe_open(tmp_path / "x.safetensors", "pt"):
        pass
    assert isinstance(unexpected.translated(caught.value), SourceError)


def test_a_token_in_an_error_is_not_shown(recipe):
    token = "hf_averysecrettokenofsomebody"
    error = f"RuntimeError('headers: authorization: Bearer {token}')"
    for options in (["check", recipe], ["--debug", "check", recipe], ["check", recipe, "--json"]):
        done = run(*options, code=1, error=error, HF_TOKEN=token)
        assert token not in done.stdout + done.stderr
        assert "Bearer <token>" in done.stdout + done.stderr

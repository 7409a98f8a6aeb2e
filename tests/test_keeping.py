"""What is compiled is kept for exactly the sources it comes of, by one process at a time."""

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import moeforge
from moeforge import kernels
from moeforge.kernels import keeping
from moeforge.system import lock_folder

numba = pytest.importorskip("numba")

HALVED = """
import numpy as np
from moeforge import kernels
assert kernels.load(["sums"], narrow=True)
from moeforge.kernels.sums import weighted
out = np.zeros(1, np.uint16)
weighted(np.full((1, 1), 0x3F80, np.uint16), np.full(1, 1 + 3 / 512, np.float32), out)
print(hex(out[0]))
"""
"""One times something three quarters of the way to the next bfloat16."""


@pytest.fixture(autouse=True)
def nowhere_else(monkeypatch):
    """Nobody has told numba where to keep what it compiles."""
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")


@pytest.fixture
def copied(tmp_path):
    """A moeforge whose kernels can be edited."""
    shutil.copytree(
        Path(moeforge.__file__).parent,
        tmp_path / "moeforge",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return tmp_path


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """A file of kernels, what is compiled of which is kept in `tmp_path`."""
    from moeforge.kernels import sums

    monkeypatch.setattr(keeping, "folder", lambda: tmp_path)
    yield sums
    kernels.unload()


def halved(folder, **env):
    given = {**os.environ, "PYTHONPATH": str(folder), **env}
    done = subprocess.run(
        [sys.executable, "-c", HALVED], env=given, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_was_compiled_of_other_sources_is_not_used(copied):
    """As after an upgrade: the file that changed is not the one that is compiled."""
    assert halved(copied) == "0x3f81"
    shared = copied / "moeforge" / "kernels" / "rows.py"
    shared.write_text(shared.read_text().replace("np.uint32(0x7FFF)", "np.uint32(0x0000)"))
    assert halved(copied) == "0x3f80"
    kept = list((copied / "moeforge" / "kernels" / "__pycache__").glob("compiled-*"))
    assert len(kept) == 1, "what nobody uses any more is removed"


def test_it_is_kept_where_numba_is_told_to(copied, tmp_path):
    halved(copied, NUMBA_CACHE_DIR=str(tmp_path / "there"))
    assert list((tmp_path / "there").rglob("*.nbc"))
    assert not list((copied / "moeforge").rglob("*.nbc"))


def test_it_is_kept_in_the_users_cache_where_the_package_cannot_be_written(copied, tmp_path):
    inside = copied / "moeforge" / "kernels"
    inside.chmod(0o555)
    if os.access(inside, os.W_OK):
        pytest.skip("this user may write anywhere")
    try:
        halved(copied, XDG_CACHE_HOME=str(tmp_path / "cache"), PYTHONDONTWRITEBYTECODE="1")
    finally:
        inside.chmod(0o755)
    assert list((tmp_path / "cache" / "moeforge").rglob("*.nbc"))


def test_the_users_cache_is_next_where_the_package_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(keeping, "_INSIDE", tmp_path / "file" / "below")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert keeping.folder.__wrapped__().parent == tmp_path / "cache" / "moeforge" / "kernels"


def test_nothing_is_compiled_where_it_cannot_be_kept(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(keeping, "_INSIDE", tmp_path / "file" / "below")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match="neither beside moeforge nor"):
        keeping.folder.__wrapped__()


def test_one_process_compiles_at_a_time(kernel, monkeypatch, tmp_path):
    """Two that compile for different dtypes would name the same file of numba's."""
    warmed = []
    monkeypatch.setattr(kernel, "warm", lambda kind: warmed.append((kind, time.monotonic())))
    let_go = lock_folder(tmp_path)
    assert let_go is not None
    waiting = threading.Thread(target=kernels.load, args=(["sums"],), kwargs={"narrow": True})
    waiting.start()
    time.sleep(0.3)
    assert not warmed
    released = time.monotonic()
    let_go()
    waiting.join()
    assert [kind for kind, _ in warmed] == [np.uint16]
    assert warmed[0][1] >= released


def test_nobody_waits_for_what_is_compiled(kernel, monkeypatch, tmp_path):
    warmed = []
    monkeypatch.setattr(kernel, "warm", warmed.append)
    assert kernels.load(["sums"], narrow=True)
    let_go = lock_folder(tmp_path)
    assert let_go is not None
    try:
        assert kernels.load(["sums"], narrow=True)
    finally:
        let_go()
    assert warmed == [np.uint16, np.uint16]


def test_where_there_are_no_locks_it_is_compiled_nevertheless(kernel, monkeypatch, tmp_path):
    def refuse(folder):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(keeping, "lock_folder", refuse)
    warmed = []
    monkeypatch.setattr(kernel, "warm", warmed.append)
    assert kernels.load(["sums"], narrow=False)
    assert warmed == [np.float32]


def test_what_failed_is_not_taken_for_compiled(kernel, monkeypatch, tmp_path):
    def fail(kind):
        raise RuntimeError("no")

    monkeypatch.setattr(kernel, "warm", fail)
    assert not kernels.load(["sums"], narrow=False)
    assert not list(tmp_path.iterdir())
    let_go = lock_folder(tmp_path)
    assert let_go is not None, "it let go"
    let_go()

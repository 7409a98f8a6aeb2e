"""Owns where compiled code is kept from one process to the next.

numba asks of what it finds only whether the function's own file has changed since. But loops of one
file go into functions of another, so each state of all files here, and each numba and processor,
has a folder of its own: after an upgrade nothing old is run. And numba numbers what it keeps of a
function without a lock: two processes that compile it for different dtypes at the same moment could
each take the other's for its own, so one waits.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from moeforge.system import lock_folder, user_cache

_INSIDE = Path(__file__).parent / "__pycache__"
_WAIT = 0.05
"""Seconds between two looks at whether another process is done."""


@cache
def folder() -> Path:
    """Return the folder for what is compiled, which can be written to.

    Where NUMBA_CACHE_DIR says, else beside the package, else in the user's cache.

    Raises:
        OSError: there is no such place.
    """
    state, processor = _state()
    for place in _places():
        found = place / f"compiled-{state}-{processor}"
        is_new = not found.exists()
        try:
            found.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=found).close()
        except OSError:
            continue
        if is_new and place == _INSIDE:  # what belongs to other sources cannot be used again
            for other in place.glob("compiled-*"):
                if not other.name.startswith(f"compiled-{state}-"):
                    shutil.rmtree(other, ignore_errors=True)
        return found
    raise OSError("what is compiled can be kept neither beside moeforge nor in the user's cache")


def _places() -> Iterator[Path]:
    from numba import config

    if config.CACHE_DIR:
        yield Path(config.CACHE_DIR)
        return
    yield _INSIDE
    yield user_cache() / "kernels"


@contextmanager
def alone(name: str, dtype: str) -> Iterator[None]:
    """Let no other process compile meanwhile, unless file `name` is compiled for `dtype`."""
    done = folder() / f"{name}.{dtype}"
    if done.exists():
        yield
        return
    let_go = _locked()
    try:
        yield
        done.touch()
    finally:
        let_go()


def _locked() -> Callable[[], None]:
    """Return when no other process has the folder, or where the file system knows no locks."""
    try:
        while (let_go := lock_folder(folder())) is None:
            time.sleep(_WAIT)
    except OSError:
        return lambda: None
    return let_go


def _state() -> tuple[str, str]:
    """Return what tells apart sources and numba's version, and processors."""
    import numba
    from llvmlite import binding  # type: ignore[import-untyped]

    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    features = binding.get_host_cpu_features().flatten()
    parts = (
        b"\0".join([numba.__version__.encode(), *sources]),
        f"{binding.get_host_cpu_name()} {features}".encode(),
    )
    state, processor = (hashlib.sha256(part).hexdigest()[:12] for part in parts)
    return state, processor

"""Owns reading every byte of a checkpoint once more: values that are finite, files that hash."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moeforge import hashes
from moeforge.errors import Finding
from moeforge.finite import Odd, count_odd
from moeforge.output.locked import Locked
from moeforge.proof.verify.checks import Check, judged
from moeforge.sealed import Sealed
from moeforge.sources.folder import FolderSource
from moeforge.system import cores

_CHUNK = 2**20
"""Bytes that a thread reads at a time; a multiple of every element's size."""
Progress = Callable[[int, int], None]


def check_values(
    source: FolderSource,
    locked: Locked,
    sealed: Mapping[str, Sealed],
    progress: Progress,
) -> tuple[Check, dict[str, str]]:
    """Count the values that are not finite, and hash files; both cores read at the same time.

    Args:
        source: the checkpoint.
        locked: the files whose hashes are wanted, and which hash.
        sealed: weights files of which both is known already.
        progress: told bytes that were read, and all of them.

    Returns:
        The check, and the hashes of the files in `locked` that are there.
    """
    folder, specs = source.folder, source.specs()
    known = sealed if locked.kind == hashes.BLAKE3 else {}
    digests = {name: seal.blake3 for name, seal in known.items()}
    spans = {name: source.locate(name) for name in specs}
    looked = [name for name, span in spans.items() if not span or span.path.name not in sealed]
    files = [folder / name for name in locked.files if name not in known]
    files = [path for path in files if path.is_file()]
    total = sum(specs[name].nbytes for name in looked) + sum(f.stat().st_size for f in files)
    tell = _Counter(total, progress)

    def digest(path: Path) -> None:
        digests[path.relative_to(folder).as_posix()] = hashes.digest_of(path, locked.kind, tell)

    odd: dict[str, Odd] = {}

    def look(name: str) -> None:
        found = _count(source, name, tell)
        if any(found):
            odd[name] = found

    with ThreadPoolExecutor(cores()) as pool:
        # Hashing one file cannot be shared: the largest first.
        files.sort(key=lambda path: -path.stat().st_size)
        waiting = [pool.submit(digest, path) for path in files]
        waiting += [pool.submit(look, name) for name in looked]
        for each in waiting:
            each.result()
    findings = []
    for name in sorted(odd):
        span = spans[name]
        where = f" in {span.path.name}" if span else ""
        nan, infinite = odd[name]
        what = f"{name}{where} has {nan} NaN and {infinite} infinite of {specs[name].numel} values"
        findings.append(Finding(what, "Look at the same tensor of the models it was made of."))
    return judged("values", findings, f"all finite in {len(specs)} tensors"), digests


class _Counter:
    """Adds up what several threads have read."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._done, self._total, self._progress = 0, total, progress
        self._lock = threading.Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._progress(self._done, self._total)


def _count(source: FolderSource, name: str, tell: Callable[[int], None]) -> Odd:
    """Count what is not finite in a tensor."""
    spec = source.specs()[name]
    nan = infinite = 0
    buffer = memoryview(bytearray(min(_CHUNK, spec.nbytes)))
    for start in range(0, spec.nbytes, _CHUNK):
        part = buffer[: min(_CHUNK, spec.nbytes - start)]
        source.read(name, start, part)
        found = count_odd(part, spec.dtype)
        nan, infinite = nan + found.nan, infinite + found.infinite
        tell(len(part))
    return Odd(nan, infinite)

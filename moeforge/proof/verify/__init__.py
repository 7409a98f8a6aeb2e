"""Owns the verdict on a checkpoint folder: every check there is, whoever made it."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeforge.bars import counted
from moeforge.errors import MoeforgeError
from moeforge.output.locked import Locked, locked_files
from moeforge.proof.verify import child, files
from moeforge.proof.verify.checks import FAILED, OK, SKIPPED, Check, Verified, judged, skipped
from moeforge.proof.verify.values import Progress, check_values
from moeforge.sealed import Sealed
from moeforge.sources.folder import FolderSource

__all__ = ["FAILED", "OK", "SKIPPED", "Check", "Verified", "verify"]

_SMALL = 200_000_000
"""Bytes of weights below which a process that has transformers loads the model itself."""
_ORDER = (
    *("files", "values", "lock", "special ids", "chat template"),
    *("config", "load", "tokenizer", "forward"),
)


def verify(
    folder: str | Path,
    *,
    forward: bool | None = None,
    trust_remote_code: bool = False,
    sealed: Mapping[str, Sealed] | None = None,
    inherited: bool = False,
    progress: Progress | bool = False,
) -> Verified:
    """Check everything that can be checked of a checkpoint folder; read it, change nothing.

    What needs transformers happens in a process of its own, unless this one has imported it
    already and the model is small.

    Args:
        folder: any checkpoint.
        forward: True runs it even where it has to be streamed from disk, False never; None where
            its files can be mapped, as those of dense models, or it takes no more than a quarter of
            the free memory.
        trust_remote_code: run code that comes with the model and is not moeforge's own.
        sealed: weights files that need not be read, because they were hashed and found finite when
            they were written.
        inherited: its tensors have the names of those of the model it was made from: what
            transformers misses or has no place for is so there, too, and no mistake.
        progress: True to see it; or what is told bytes that were read, and all of them.

    Raises:
        SourceError: it is no checkpoint.
    """
    began = time.perf_counter()
    folder = Path(folder)
    source = FolderSource(str(folder), folder)
    checks = [files.check_files(source)]
    if checks[0].state == FAILED:
        checks += skipped("the files are not whole", *_ORDER[1:])
        return Verified(folder, tuple(checks), time.perf_counter() - began)
    options: dict[str, Any] = {
        "forward": forward,
        "trust_remote_code": trust_remote_code,
        "inherited": inherited,
    }
    size = sum(spec.nbytes for spec in source.specs().values())
    alone = size > _SMALL or "transformers" not in sys.modules
    other = child.start(folder, **options) if alone else None
    try:
        checks += _read_all(source, sealed or {}, counted(progress, "verify"))
        checks += [files.check_special_ids(source), files.check_template(folder)]
        if other:
            checks += child.finish(other)
        else:
            from moeforge.proof.verify.running import run_checks

            checks += run_checks(folder, **options)
    finally:
        if other and other.poll() is None:
            other.kill()
            other.wait()
    return Verified(folder, tuple(checks), time.perf_counter() - began)


def _read_all(
    source: FolderSource, sealed: Mapping[str, Sealed], progress: Progress
) -> list[Check]:
    """Check values and lock."""
    try:
        locked = locked_files(source.folder)
    except MoeforgeError as error:
        values, _ = check_values(source, Locked(), sealed, progress)
        return [values, judged("lock", error.findings)]
    values, digests = check_values(source, locked, sealed, progress)
    if not locked.files:
        return [values, *skipped("there is no lock file", "lock")]
    return [values, files.check_lock(source.folder, locked, digests)]

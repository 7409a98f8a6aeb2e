"""Owns the work folder beside an output: its lock, and publishing what was made in it.

What is published is on the disk before it gets its name, and gets it in one step.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moeforge.errors import BuildError, Finding
from moeforge.system import exchange, lock_folder, sync

_REPLACED = "replaced"
"""Name of the old folder in the work folder, where it cannot change places with the new one."""


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Refuse to touch what already stands at `out`.

    Raises:
        BuildError: it exists and `overwrite` is not set, or is no folder of a model.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise BuildError(Finding(f"{out} exists", "Choose another folder with -o, or --overwrite."))
    if not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").exists()):
        what = f"{out} is not a model folder"
        raise BuildError(Finding(what, "It is not overwritten; choose another folder with -o."))


def refuse_inputs(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse to replace a folder that holds a model which the output is made from.

    Raises:
        BuildError: `out` is an input's folder or holds one.
    """
    if not out.exists():
        return
    for folder in inputs:
        # Not by their names: some file systems tell no capitals from small letters.
        here = folder.resolve()
        if any(path.exists() and path.samefile(out) for path in (here, *here.parents)):
            what = f"{out} holds {folder}, which the output is made from"
            raise BuildError(Finding(what, "It is not overwritten; choose another folder with -o."))


def work_folder(out: Path) -> Path:
    """Return the folder in which the output that is to stand at `out` is made."""
    return out.absolute().with_name(f".{out.absolute().name}.moeforge")


@contextmanager
def locked(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give the work folder of `out`, which no other process has meanwhile; it is not removed.

    Raises:
        BuildError: `out` exists and `overwrite` is not set, another build is making it, or the
            disk refuses.
    """
    refuse_existing(out, overwrite=overwrite)
    work = work_folder(out)
    try:
        work.parent.mkdir(parents=True, exist_ok=True)
        let_go = lock_folder(work)
    except OSError as error:
        raise BuildError(Finding(f"cannot write beside {out}: {error.strerror}")) from error
    except BaseException:  # Ctrl-C
        with suppress(OSError):
            work.rmdir()
        raise
    if let_go is None:
        what = f"another build is making {out} now"
        raise BuildError(Finding(what, "Wait for it, or choose another folder with -o."))
    try:
        _put_back(out.absolute(), work)
        refuse_existing(out, overwrite=overwrite)
        yield work
    finally:
        with suppress(OSError):
            work.rmdir()  # where nothing is in it
        let_go()


@contextmanager
def staging(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a new folder beside `out`; publish it as `out` when the block ends without an error.

    Until then nothing stands at `out`, however the process ends. What a killed run left is
    cleared away by the next one; a run that is still going on is not disturbed.

    Raises:
        BuildError: as `locked`.
    """
    with locked(out, overwrite=overwrite) as work:
        try:
            for item in work.iterdir():
                shutil.rmtree(item) if item.is_dir() else item.unlink()
            made = work / "model"
            made.mkdir()
            yield made
            publish(made, out.absolute(), work, overwrite=overwrite)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _put_back(out: Path, work: Path) -> None:
    """Give the old folder its name again, if a process was killed while it had none."""
    replaced = work / _REPLACED
    if (replaced.exists() or replaced.is_symlink()) and not (out.exists() or out.is_symlink()):
        replaced.rename(out)


def publish(made: Path, out: Path, work: Path, *, overwrite: bool) -> None:
    """Give folder `made` the name `out`; a folder that has it changes places with it.

    Raises:
        BuildError: something came into being at `out` that is not to be overwritten.
        OSError: the disk refuses.
    """
    refuse_existing(out, overwrite=overwrite)  # it may have come into being meanwhile
    for folder, _, files in os.walk(made):
        for name in files:
            sync(Path(folder) / name)
        sync(Path(folder))
    if not out.exists():
        made.rename(out)
    elif not exchange(made, out):
        out.rename(work / _REPLACED)
        try:
            made.rename(out)
        except BaseException:
            _put_back(out, work)
            raise
    sync(out.parent)

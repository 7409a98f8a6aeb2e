"""Owns the output folder: made beside its place under another name, published by one rename."""

from __future__ import annotations

import fcntl
import fnmatch
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moeforge.errors import BuildError, Finding
from moeforge.sources.folder import read_json

_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "vocab.json",
    "vocab.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Files of the donor that belong to every output, byte for byte."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")


def has_tokenizer(folder: Path | None) -> bool:
    """Say whether `folder` has the files of a tokenizer."""
    return folder is not None and any(
        fnmatch.fnmatch(file.name, pattern)
        for file in folder.iterdir()
        for pattern in TOKENIZER_FILES
    )


def has_chat_template(folder: Path | None) -> bool:
    """Say whether the tokenizer in `folder` has a chat template, in any of its three places."""
    if folder is None:
        return False
    if any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    config = folder / "tokenizer_config.json"
    return config.exists() and "chat_template" in read_json(config)


def copy_companions(donor: Path | None, folder: Path) -> list[str]:
    """Copy tokenizer, chat template and generation config of `donor`; return their names."""
    if donor is None:
        return []
    copied = []
    for item in sorted(donor.iterdir()):
        if not any(fnmatch.fnmatch(item.name, pattern) for pattern in _COMPANIONS):
            continue
        if item.is_dir():
            shutil.copytree(item, folder / item.name)
        else:
            shutil.copyfile(item, folder / item.name)
        copied.append(item.name)
    return copied


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write `data` as transformers writes its config files: two spaces, sorted keys."""
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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


@contextmanager
def staging(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a new folder beside `out`; publish it as `out` when the block ends without an error.

    Until then nothing stands at `out`, however the process ends. What a killed build left is
    cleared away by the next one; a build that is still running is not disturbed.

    Raises:
        BuildError: `out` exists and `overwrite` is not set, another build is making it, or the
            disk refuses.
    """
    refuse_existing(out, overwrite=overwrite)
    work = out.absolute().with_name(f".{out.absolute().name}.moeforge")
    try:
        work.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(work)
    except OSError as error:
        raise BuildError(Finding(f"cannot write beside {out}: {error.strerror}")) from error
    if lock is None:
        what = f"another build is making {out} now"
        raise BuildError(Finding(what, "Wait for it, or choose another folder with -o."))
    try:
        _clear(work)
        made = work / "model"
        made.mkdir()
        yield made
        _publish(made, out.absolute(), work, overwrite=overwrite)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _lock(work: Path) -> int | None:
    """Make folder `work` and lock it; return the lock, or None where another process has it."""
    while True:
        work.mkdir(exist_ok=True)
        lock = os.open(work, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), work.stat()):
                return lock
        except BlockingIOError:
            os.close(lock)
            return None
        except FileNotFoundError:
            pass
        os.close(lock)  # a build that ended just now took the folder with it: make it anew


def _clear(folder: Path) -> None:
    for item in folder.iterdir():
        shutil.rmtree(item) if item.is_dir() else item.unlink()


def _publish(made: Path, out: Path, work: Path, *, overwrite: bool) -> None:
    refuse_existing(out, overwrite=overwrite)  # it may have come into being meanwhile
    if out.exists():
        out.rename(work / "replaced")
    made.rename(out)

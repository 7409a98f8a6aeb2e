"""Owns what is said of errors that nobody foresaw: of the system, of libraries, of moeforge."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path

import moeforge
from moeforge.errors import (
    BuildError,
    Finding,
    MoeforgeError,
    SourceError,
    out_of_memory,
)

DEBUG = "MOEFORGE_DEBUG"
"""Environment variable that asks for tracebacks; `moeforge --debug` sets it."""

_SYSTEM = {
    errno.ENOSPC: "Free some space, or choose another disk.",
    errno.EDQUOT: "Your quota there is used up: free some space, or choose another disk.",
    errno.EACCES: "Choose a place that you may use, or change its permissions.",
    errno.EPERM: "Choose a place that you may use, or change its permissions.",
    errno.EROFS: "It is on a disk that cannot be written to: choose another.",
    errno.EMFILE: "Too many files are open: raise the limit with `ulimit -n 4096`.",
    errno.ENFILE: "Too many files are open on this machine: end other programs.",
    errno.EIO: "The disk reports an error: check it before you go on.",
    errno.ENOENT: "Correct the path.",
    errno.ENOTDIR: "Correct the path.",
    errno.EISDIR: "Name a file.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
}
_MEMORY = "Use fewer --threads, give --memory what is free, or end other programs."


def translated(error: BaseException) -> MoeforgeError | None:
    """Return what a user can do something about, or None where moeforge made a mistake."""
    if out_of_memory(error):
        return BuildError(Finding("there is not enough memory", _MEMORY))
    if type(error).__name__ == "SafetensorError":
        what = f"a safetensors file cannot be read: {error}"
        return SourceError(Finding(what, "Download or export it again."))
    if isinstance(error, OSError) and error.errno in _SYSTEM:
        where = f"{error.filename}: " if error.filename else ""
        return BuildError(Finding(f"{where}{error.strerror}", _SYSTEM[error.errno]))
    return None


def mistake(error: BaseException) -> Finding:
    """Return in one line an error that only a mistake of moeforge can cause, and where it is."""
    frames = traceback.extract_tb(error.__traceback__)
    root = str(Path(moeforge.__file__).parent)
    own = next((frame for frame in reversed(frames) if frame.filename.startswith(root)), None)
    at = f" ({Path(own.filename).relative_to(Path(root).parent)}:{own.lineno})" if own else ""
    said = " ".join(str(error).split())[:300]
    what = f"{type(error).__name__}{f': {said}' if said else ''}{at}"
    command = " ".join(["moeforge --debug", *sys.argv[1:2], "…"])
    fix = f"This is a mistake in moeforge: run `{command}` and report what it prints."
    return Finding(what, fix)


def trace(error: BaseException) -> str:
    """Return the whole traceback of an error, without the token of the Hub."""
    return hidden("".join(traceback.format_exception(error)))


def hidden(text: str) -> str:
    """Return `text` without the user's token of the Hub, should a library have quoted it."""
    tokens = [os.environ.get("HF_TOKEN", ""), os.environ.get("HUGGING_FACE_HUB_TOKEN", "")]
    if "huggingface_hub" in sys.modules:
        from huggingface_hub import get_token

        tokens.append(get_token() or "")
    for token in tokens:
        if len(token) > 4:
            text = text.replace(token, "<token>")
    return text


def debugging() -> bool:
    """Say whether tracebacks are wanted."""
    return os.environ.get(DEBUG, "") not in ("", "0")

"""Owns reading text files that others wrote: regular files only, and none without bounds.

A pipe would wait forever for a writer, and a device never ends.
"""

from __future__ import annotations

from pathlib import Path

MOST = 2_000_000_000
"""Bytes; no text that is read whole comes near."""


def read_text(path: Path, *, most: int = MOST, encoding: str = "utf-8") -> str:
    """Return the text of `path`.

    Args:
        path: a file.
        most: bytes it may have.
        encoding: how it is encoded.

    Raises:
        OSError: it cannot be read, is no regular file, or is longer.
        UnicodeDecodeError: it is not text.
    """
    if path.exists() and not path.is_file():
        raise OSError(0, "it is a folder" if path.is_dir() else "it is not a regular file")
    if (size := path.stat().st_size) > most:
        raise OSError(0, f"it has {size} bytes, more than {most}")
    return path.read_text(encoding=encoding)

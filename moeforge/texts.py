"""Owns care with files that others wrote: what is read as text, and which links are followed.

A pipe would wait forever for a writer, and a device never ends. A link in a folder that somebody
else made may lead to a private key, and a copy of it would be published with the model.
"""

from __future__ import annotations

from pathlib import Path

from moeforge.errors import Finding, SourceError

MOST = 2_000_000_000
"""Bytes; no text that is read whole comes near."""


def expanded(path: str) -> Path:
    """Return `path` with the home folder in place of `~`, where there is such a home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


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


def refuse_links(item: Path) -> None:
    """Refuse a file or folder whose links lead to something else than what they are called.

    Followed are links into the Hub's cache, as huggingface_hub makes them, and links to something
    of the same name, as people make them to share a tokenizer between models.

    Args:
        item: what is about to be copied out of the folder of a model.

    Raises:
        SourceError: a link leads elsewhere.
    """
    for path in (item, *(item.rglob("*") if item.is_dir() else ())):
        target = path.resolve()
        cached = target.parent.name == "blobs" and path.parent.resolve().is_relative_to(
            target.parent.parent / "snapshots"
        )
        if path.is_symlink() and target.name != path.name and not cached:
            what = f"{path} is a link to {target}, which would be copied into the output"
            raise SourceError(Finding(what, "Remove the link, or put the file in its place."))

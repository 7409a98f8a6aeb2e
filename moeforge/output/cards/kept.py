"""Owns what users write into a card: found again and kept, or the card is not touched.

It stands between two markers. Changes of the front matter are kept too, key by key. Any other
change would be lost when the card is made again: then it is not.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeforge.errors import BuildError, Finding
from moeforge.output.cards import facts, metadata
from moeforge.system import sync
from moeforge.texts import read_text

CARD = "README.md"
BEGIN = "<!-- moeforge: your text -->"
END = "<!-- moeforge: end of your text -->"
_MOST = 5_000_000
"""Bytes of a card."""


@dataclass(frozen=True)
class Yours:
    """What a user wrote into a card.

    Attributes:
        text: what stands between the markers.
        changes: keys of the front matter that are not as moeforge wrote them; None for a key that
            is not there any more.
        body: SHA-256 of the rest of the card; empty where there is no card.
    """

    text: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    body: str = ""


def digest(above: str, below: str) -> str:
    """Return what tells whether a card was changed outside the markers.

    Args:
        above: what stands between the front matter and the markers.
        below: what stands after them.
    """
    return hashlib.sha256(f"{above.strip()}\n\n{below.strip()}".encode()).hexdigest()


def yours(folder: Path) -> Yours:
    """Return what the user wrote into the card in `folder`, which may be another folder's.

    Raises:
        BuildError: what is the user's cannot be told from what is not.
        SourceError: the facts beside it are damaged.
    """
    path, record = folder / CARD, facts.read(folder)
    if not path.is_file():
        return Yours()
    try:
        text = read_text(path, most=_MOST)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BuildError(Finding(f"{path} cannot be read: {reason}", _FIX)) from None
    front, body = _divided(text)
    if record is None and BEGIN not in text and END not in text:
        return Yours()  # not a card of moeforge
    before, mine, after = _parted(body, path)
    data = _parsed(front, path)
    changes = metadata.changed(data, record.metadata) if record else {}
    return Yours(mine, changes, digest(before, after))


def yours_alone(folder: Path, fresh: str = "") -> Yours:
    """Return the same, if nothing else was changed in the card.

    Args:
        folder: a model folder.
        fresh: digest of a card made now, which is no change either.

    Raises:
        BuildError: something else was, and would be lost.
        SourceError: the facts beside it are damaged.
    """
    found, record = yours(folder), facts.read(folder)
    if found.body and record and found.body not in (record.body, fresh):
        what = f"{folder / CARD} was changed outside the markers, and that would be lost"
        raise BuildError(Finding(what, f"{_BETWEEN} Or remove {CARD}."))
    return found


_BETWEEN = f'Put your own text between the lines "{BEGIN}" and "{END}".'
_FIX = f"Correct it, or remove {CARD} if there is nothing of yours in it."


def _divided(text: str) -> tuple[str, str]:
    """Return front matter and body of a card."""
    lines = text.lstrip("\ufeff").split("\n")
    if lines[0].rstrip() == "---":
        for number, line in enumerate(lines[1:], 1):
            if line.rstrip() == "---":
                return "\n".join(lines[1:number]), "\n".join(lines[number + 1 :])
    return "", "\n".join(lines)


def _parted(body: str, path: Path) -> tuple[str, str, str]:
    """Return what stands before, between and after the markers.

    Raises:
        BuildError: there is not exactly one pair of them.
    """
    lines = body.split("\n")
    begins = [n for n, line in enumerate(lines) if line.strip() == BEGIN]
    ends = [n for n, line in enumerate(lines) if line.strip() == END]
    wrong = ""
    if not begins or not ends:
        lost = [f'"{mark}"' for mark, found in ((BEGIN, begins), (END, ends)) if not found]
        wrong = f"has lost the line {' and '.join(lost)}"
    elif len(begins) > 1 or len(ends) > 1:
        mark = BEGIN if len(begins) > 1 else END
        wrong = f'has the line "{mark}" {max(len(begins), len(ends))} times'
    elif begins[0] > ends[0]:
        wrong = f'has the line "{END}" before "{BEGIN}"'
    if wrong:
        what = f"{path} {wrong}: what is your text cannot be told, and nothing was written"
        raise BuildError(Finding(what, f"{_BETWEEN} Or remove {CARD}."))
    parts = lines[: begins[0]], lines[begins[0] + 1 : ends[0]], lines[ends[0] + 1 :]
    above, mine, below = map("\n".join, parts)
    return above, mine, below


def _parsed(front: str, path: Path) -> dict[str, Any]:
    """Return the front matter of a card as data.

    Raises:
        BuildError: it is not YAML, or no mapping.
    """
    import yaml

    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(front)):
            raise ValueError("it has an alias (*), which is not followed")
        data = yaml.safe_load(front)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise BuildError(
            Finding(f"{path}: its front matter cannot be used: {reason}", _FIX)
        ) from None
    if not isinstance(data, dict | None):
        raise BuildError(Finding(f"{path}: its front matter is no mapping", _FIX))
    return data or {}


def store(path: Path, text: str) -> None:
    """Write a file into a folder that nobody else sees yet.

    Raises:
        OSError: the disk refuses.
    """
    path.write_text(text, encoding="utf-8", newline="\n")


def replace(path: Path, text: str) -> None:
    """Write a file that is there whole, old or new, whenever the process ends.

    Raises:
        OSError: the disk refuses.
    """
    half = path.with_name(f".{path.name}.half")
    try:
        store(half, text)
        sync(half)
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)
    sync(path.parent)

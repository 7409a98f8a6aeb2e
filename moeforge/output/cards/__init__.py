"""Owns the model card: README.md, made from facts that are kept beside it in moeforge.card.json.

A card can be made again at any time, without the parents; what users wrote into it is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moeforge.errors import Finding, SourceError
from moeforge.output.cards import facts as stored
from moeforge.output.cards import metadata, render
from moeforge.output.cards.facts import NAME, Engine, Facts, Record
from moeforge.output.cards.gather import gather
from moeforge.output.cards.kept import CARD, Yours, digest, replace, store, yours, yours_alone
from moeforge.texts import read_text

__all__ = [
    "CARD",
    "NAME",
    "PICTURE",
    "Engine",
    "Facts",
    "Yours",
    "gather",
    "has_facts",
    "remake",
    "retell",
    "write",
    "yours",
    "yours_alone",
]

PICTURE = "routing.png"
"""The heat map beside the card, which shows it."""
_RECIPE = "moeforge.yml"


def has_facts(folder: Path) -> bool:
    """Say whether the card in `folder` can be made again."""
    return (folder / NAME).is_file()


def write(
    folder: Path, facts: Facts, mine: Yours, put: Callable[[Path, str], None] = store
) -> dict[str, Any]:
    """Write the card and its facts into `folder`; return the front matter.

    Args:
        folder: a model folder, with the recipe in it, which nobody else sees yet.
        facts: what is told.
        mine: what a user wrote into the card that it replaces.
        put: how a file is written.
    """
    parts = render.body(facts, _recipe(folder))
    fresh = metadata.generated(facts)
    front = metadata.with_changes(fresh, mine.changes)
    put(folder / CARD, render.card(metadata.written(front), parts, mine.text))
    put(folder / NAME, stored.dump(Record(facts, fresh, digest(*parts))))
    return front


def retell(folder: Path, change: Callable[[Facts], Facts], mine: Yours) -> None:
    """Make the card in a work folder again, of changed facts.

    Args:
        folder: a model folder that has facts.
        change: returns what is to be told now.
        mine: what a user wrote into the card.

    Raises:
        SourceError: the facts are damaged.
    """
    record = stored.read(folder)
    assert record is not None, "whoever calls this has asked"
    facts = change(record.facts)
    if not facts.routing:
        (folder / PICTURE).unlink(missing_ok=True)
    write(folder, facts, mine)


def remake(folder: Path) -> Mapping[str, Any]:
    """Make the card of a finished model folder again, and return its front matter.

    Raises:
        SourceError: moeforge did not make the folder, or its facts are damaged.
        BuildError: what is the user's in the card cannot be told from what is not, or would be
            lost; nothing was written.
    """
    record = stored.read(folder)
    if record is None:
        what = f"{folder} has no {NAME}, from which its card would be made"
        if not folder.is_dir():
            what = f"{folder} is no folder"
        raise SourceError(Finding(what, "Give a folder that `moeforge build` made."))
    fresh = digest(*render.body(record.facts, _recipe(folder)))
    return write(folder, record.facts, yours_alone(folder, fresh), replace)


def _recipe(folder: Path) -> str:
    path = folder / _RECIPE
    return read_text(path) if path.is_file() else ""

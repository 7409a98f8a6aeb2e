"""Owns the command about model cards: card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moeforge.cli.shared import Json, print_json, reporting


def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that moeforge made.")],
    as_json: Json = False,
) -> None:
    """Make the model card of a finished folder again; what you wrote into it is kept."""
    with reporting(as_json=as_json):
        from moeforge.output import cards

        front = cards.remake(folder)
        if as_json:
            # YAML has dates, which JSON has not.
            metadata = json.loads(json.dumps(front, default=str))
            print_json({"card": str(folder / cards.CARD), "metadata": metadata})
        else:
            print(folder / cards.CARD)

"""Owns the commands about checkpoints and shelves: inspect, show."""

from __future__ import annotations

from typing import Annotated

import typer

from moeforge.cli.shared import (
    Json,
    Offline,
    print_json,
    print_parts,
    reporting,
)


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint is, from its config and headers."""
    with reporting(as_json=as_json):
        from moeforge.sources import open_source
        from moeforge.tables import facts, facts_table

        found = facts(open_source(model, revision, offline=offline))
        if as_json:
            print_json(found)
            return
        print_parts(facts_table(found))


def show(
    shelf: Annotated[str, typer.Argument(help="methods, families or gates.")],
    as_json: Json = False,
) -> None:
    """List the merge methods, MoE families or gate modes."""
    with reporting(as_json=as_json):
        from moeforge.errors import nearest
        from moeforge.tables import SHELVES, shelf_rows, shelf_table

        if shelf not in SHELVES:
            raise typer.BadParameter(
                f'"{shelf}"{nearest(shelf, SHELVES)} Known: {", ".join(SHELVES)}'
            )
        if as_json:
            print_json(shelf_rows(shelf))
        else:
            print_parts(shelf_table(shelf))

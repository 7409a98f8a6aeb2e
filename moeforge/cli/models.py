"""Owns the commands about checkpoints and shelves: inspect, show, push."""

from __future__ import annotations

from pathlib import Path
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


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A finished model folder.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="For a new repository.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    message: Annotated[str | None, typer.Option("-m", "--message", help="Commit message.")] = None,
) -> None:
    """Upload a model folder with its card to the Hugging Face Hub."""
    with reporting():
        from moeforge.output.push import push as upload

        print(upload(folder, repo, private=private, revision=revision, message=message))

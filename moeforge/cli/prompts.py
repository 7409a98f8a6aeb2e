"""Owns the commands about prompts: prompts select, prompts cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeforge.cli.shared import (
    Device,
    Json,
    Offline,
    check_device,
    note,
    print_json,
    print_parts,
    reporting,
    showing_progress,
    watched,
)

app = typer.Typer(help="Choose the prompts that routers are made from.", no_args_is_help=True)

Out = Annotated[Path, typer.Option("-o", "--out", help="Folder to make.", show_default=False)]
Embedding = Annotated[
    str | None,
    typer.Option(
        "--embedding-model",
        help="Folder or Hub id (default: sentence-transformers/all-MiniLM-L6-v2).",
    ),
]


@app.command()
def select(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE…", help="Prompt files, one for each expert.")
    ],
    count: Annotated[int, typer.Option("-k", "--keep", min=1, help="Prompts to keep of each.")],
    out: Out,
    embedding_model: Embedding = None,
    device: Device = "cpu",
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Keep the prompts that stand for the others of their file, far from those of other files."""
    with reporting(as_json=as_json):
        from moeforge.prompting import select_files
        from moeforge.prompting.shown import selection_json, selection_table
        from moeforge.recipe.selecting import EMBEDDING_MODEL

        check_device(device)
        with showing_progress(shown=watched(as_json=as_json)) as progress:
            kept = select_files(
                files,
                count,
                out,
                embedding_model=embedding_model or EMBEDDING_MODEL,
                device=device,
                offline=offline,
                progress=progress,
            )
        if as_json:
            print_json(selection_json(kept))
            return
        for each in kept:
            for finding in each.findings():
                note(finding)
        print_parts(selection_table(kept))


@app.command()
def cluster(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS", help="Prompt file without owners.")],
    experts: Annotated[
        list[str], typer.Option("--expert", help="Dense model; once for each expert.")
    ],
    out: Out,
    embedding_model: Embedding = None,
    seed: Annotated[int, typer.Option(min=0, help="Starts of k-means.")] = 0,
    device: Device = "cpu",
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Divide a corpus into domains and give each to the expert that predicts it best."""
    with reporting(as_json=as_json):
        from moeforge.prompting import cluster_corpus
        from moeforge.prompting.shown import clusters_json, clusters_table
        from moeforge.recipe.selecting import EMBEDDING_MODEL

        check_device(device)
        with showing_progress(shown=watched(as_json=as_json)) as progress:
            found = cluster_corpus(
                corpus,
                experts,
                out,
                embedding_model=embedding_model or EMBEDDING_MODEL,
                seed=seed,
                device=device,
                offline=offline,
                progress=progress,
            )
        if as_json:
            print_json(clusters_json(found))
            return
        for finding in found.findings():
            note(finding)
        print_parts(clusters_table(found))

"""Owns the commands about what models do with text: eval, route, tune."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeforge.cli.shared import (
    Code,
    Device,
    Json,
    Offline,
    Overwrite,
    check_device,
    note,
    parse_size,
    print_json,
    print_parts,
    reporting,
    showing_progress,
    watched,
)
from moeforge.errors import BuildError, Finding

if TYPE_CHECKING:
    from moeforge.tuning.train import Step


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL…", help="Folders or Hub ids.")],
    text: Annotated[list[Path], typer.Option("--text", help="UTF-8 text file; may be repeated.")],
    window: Annotated[
        int, typer.Option(min=2, help="Tokens that a model sees at a time, BOS included.")
    ] = 256,
    dtype: Annotated[str, typer.Option(help="auto (as stored) or float32.")] = "auto",
    device: Device = "cpu",
    memory: Annotated[
        str | None,
        typer.Option(help="Most memory for weights, such as 4GB (default: 4/5 of free)."),
    ] = None,
    code: Code = False,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Compare models on text: loss, perplexity and bits per byte of each file."""
    with reporting(as_json=as_json):
        from moeforge.eval_tables import comparison_json, comparison_tables
        from moeforge.proof.perplexity import compare

        check_device(device)
        limit = parse_size(memory) if memory else None
        with showing_progress(shown=watched(as_json=as_json)) as progress:
            found = compare(
                models,
                text,
                dtype=dtype,
                device=device,
                memory=limit,
                window=window,
                trust_remote_code=code,
                offline=offline,
                progress=progress,
            )
        if as_json:
            print_json(comparison_json(found))
            return
        for finding in found.notes:
            note(finding)
        print_parts(*comparison_tables(found))


def route(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A mixture: folder or Hub id.")],
    prompts: Annotated[
        list[Path] | None,
        typer.Option("--prompts", help="Prompt file (.txt, .jsonl), a domain; may be repeated."),
    ] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE for each expert in order, or NUMBER=FILE for some."),
    ] = None,
    heat_map: Annotated[Path | None, typer.Option("--map", help="PNG file to draw.")] = None,
    page: Annotated[Path | None, typer.Option("--html", help="HTML page to write.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (as stored) or float32.")] = "auto",
    device: Device = "cpu",
    code: Code = False,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Show where a mixture sends the tokens of prompts, by layer and expert."""
    with reporting(as_json=as_json):
        from moeforge.proof import route_tables
        from moeforge.proof.routing_of import route as measure

        if not prompts and not expert:
            what = "there are no prompts to route"
            raise BuildError(Finding(what, "Give --prompts FILE or --expert NAME=FILE."))
        check_device(device)
        with showing_progress(shown=watched(as_json=as_json)) as progress:
            found = measure(
                model,
                prompts or [],
                expert or [],
                revision=revision,
                offline=offline,
                device=device,
                dtype=dtype,
                trust_remote_code=code,
                progress=lambda done, total: progress("prompts", done, total),
            )
        if heat_map:
            from moeforge.proof.route_map import draw

            draw(found, heat_map)
        if page:
            from moeforge.proof.route_page import render

            page.write_text(render(found), encoding="utf-8")
        if as_json:
            print_json(route_tables.as_data(found))
        else:
            print_parts(*route_tables.as_tables(found))


@contextmanager
def showing_steps(*, shown: bool) -> Iterator[Any]:
    """Give a callback that draws the steps of a training with loss and load."""
    if not shown:
        yield lambda step: None
        return
    from rich import progress as bars
    from rich.console import Console

    from moeforge.tuning.tables import step_line

    columns = (
        bars.TextColumn("routers"),
        bars.BarColumn(bar_width=20),
        bars.TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        bars.TextColumn("{task.fields[line]}"),
        bars.TimeRemainingColumn(),
    )
    best: list[float] = []
    with bars.Progress(*columns, console=Console(stderr=True)) as display:
        task = display.add_task("routers", total=None, line="")

        def show(step: Step) -> None:
            if step.heldout is not None:
                best.append(step.heldout)
            line = step_line(step, min(best, default=None))
            display.update(task, completed=step.number, total=step.steps, line=line)

        yield show


def tune(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A mixture of experts.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Output folder.", show_default=False)],
    text: Annotated[
        list[Path] | None, typer.Option("--text", help="Text to train on; may be repeated.")
    ] = None,
    prompts: Annotated[
        list[Path] | None, typer.Option("--prompts", help="Prompt file (.txt, .jsonl) to train on.")
    ] = None,
    heldout: Annotated[
        list[Path] | None, typer.Option("--held-out", help="Text for early stopping.")
    ] = None,
    teacher: Annotated[
        list[str] | None, typer.Option("--teacher", help="Dense model to learn from.")
    ] = None,
    teach: Annotated[
        float | None, typer.Option(help="Share of the teachers in the loss (default: 1 with any).")
    ] = None,
    balance: Annotated[float, typer.Option(help="Factor on the load-balance loss.")] = 0.0,
    steps: Annotated[int, typer.Option(min=1, help="Most optimiser steps.")] = 200,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak rate (default: 0.38 / hidden size).")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Documents per step.")] = 16,
    window: Annotated[int, typer.Option(min=2, help="Most tokens per document.")] = 256,
    patience: Annotated[
        int, typer.Option(min=1, help="Held-out measurements without a new best before it ends.")
    ] = 4,
    active: Annotated[
        int | None,
        typer.Option(min=1, help="Experts per token while training (default: the mixture's, 2+)."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Order of the documents.")] = 0,
    device: Device = "cpu",
    code: Code = False,
    overwrite: Overwrite = False,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Train the routers of a mixture, and nothing else, on text."""
    with reporting(as_json=as_json):
        from moeforge import tuning
        from moeforge.recipe import parse_tuning
        from moeforge.tuning.tables import tuned_json, tuned_table, verdict

        check_device(device)
        settings = parse_tuning(
            {
                "text": list(map(str, text or [])),
                "prompts": list(map(str, prompts or [])),
                "heldout": list(map(str, heldout or [])),
                "teach": teach if teach is not None else 1.0 if teacher else 0.0,
                "balance": balance,
                "steps": steps,
                "learning_rate": learning_rate,
                "batch": batch,
                "window": window,
                "patience": patience,
                "active": active,
            }
        )
        with showing_steps(shown=watched(as_json=as_json)) as told:
            tuned = tuning.tune(
                folder,
                out,
                settings,
                seed=seed,
                teachers=teacher or (),
                device=device,
                code=code,
                overwrite=overwrite,
                offline=offline,
                progress=told,
            )
        if as_json:
            print_json(tuned_json(tuned))
        else:
            from rich.markup import escape

            told_of = f"[bold]{escape(str(out))}[/]: {escape(verdict(tuned))}"
            print_parts(told_of, tuned_table(tuned))

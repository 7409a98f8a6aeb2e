"""Owns the command line: the only room that prints or exits. Everything else is in `forge`."""

from __future__ import annotations

import gc
import os
from typing import Annotated

import typer

from moeforge.cli import cards, mixtures, models, prompts, proofs, push, recipes, starter, surgery
from moeforge.cli.unexpected import DEBUG
from moeforge.cli.usage import Commands, prepare_streams
from moeforge.version import __version__

app = typer.Typer(
    name="moeforge",
    cls=Commands,
    help="Make one language model out of several: mixtures of experts, stacks and merges.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (
    starter.new,
    recipes.build,
    recipes.check,
    recipes.plan,
    models.inspect,
    models.show,
    push.push,
    cards.card,
    mixtures.route,
    mixtures.tune,
    surgery.extract,
    surgery.experts,
    surgery.upcycle,
    proofs.verify,
    proofs.rebuild,
    proofs.diff,
    starter.schema,
):
    app.command()(command)
app.command("eval")(mixtures.evaluate)
app.add_typer(prompts.app, name="prompts")


def _version(value: bool) -> None:
    if value:
        print(f"moeforge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar=DEBUG, help="Print tracebacks of errors.")
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG] = "1"  # the processes that a command starts read it too


def main() -> None:
    """Run the command line."""
    # Importing torch makes a million objects, none of them garbage: looking through them while they
    # come takes 0.15 s, and once more at the end 0.3 s.
    gc.set_threshold(100_000, 20, 20)
    prepare_streams()
    try:
        app()
    finally:
        gc.freeze()

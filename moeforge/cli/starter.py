"""Owns the commands that begin a recipe: new, schema."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeforge.cli.shared import Json, print_json, print_parts, reporting
from moeforge.errors import Finding, RecipeError

if TYPE_CHECKING:
    from moeforge.starter import Answers, Kind


def new(
    kind: Annotated[
        str | None, typer.Argument(metavar="KIND", help="What to make; --list shows the kinds.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Recipe to write (default: KIND.yml).")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("-m", "--model", help="Folder or Hub id; once for each model or adapter."),
    ] = None,
    base: Annotated[str | None, typer.Option("-b", "--base", help="The base model.")] = None,
    prompts: Annotated[
        list[str] | None, typer.Option(help="Prompts file; once for each expert.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Merge method.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the result (default: as the models).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing recipe.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="Show the kinds of recipes.")] = False,
    as_json: Json = False,
) -> None:
    """Write a starter recipe with comments; asks for what the flags leave open."""
    with reporting(as_json=as_json):
        from moeforge import starter

        if listed:
            _show_kinds(starter.KINDS, as_json=as_json)
            return
        asks = sys.stdin.isatty() and not as_json
        if kind is None:
            if not asks:
                what = f"which kind of recipe is not said; there are {', '.join(starter.KINDS)}"
                raise RecipeError(Finding(what, "moeforge new --list says what they are."))
            _show_kinds(starter.KINDS, as_json=False)
            kind = typer.prompt("What to make", default="soup")
        if kind not in starter.KINDS:
            raise RecipeError(starter.unknown(kind))
        path = out or Path(f"{kind}.yml")
        if not force:  # before anything is asked
            starter.refuse_existing(path)
        answers = starter.Answers(
            tuple(model or ()), base, method, dtype, prompts=tuple(prompts or ())
        )
        if asks and not (answers.models and (base or starter.KINDS[kind].base != "required")):
            answers = _asked(starter.KINDS[kind], answers)
        if wrong := starter.missing(kind, answers):
            raise RecipeError(*wrong)
        schema = starter.write(kind, answers, path, force=force)
        if as_json:
            print_json({"kind": kind, "recipe": str(path), "schema": str(schema)})
            return
        print(f"{path}: a recipe for {starter.KINDS[kind].goal}")
        print(f"{schema}: what editors check it with")
        todo = "Read it, change what you like"
        if starter.KINDS[kind].prompts and not answers.prompts:
            todo = "Put your prompts in place of the placeholders"
        print(f"{todo}, then: moeforge check {path}")


def _show_kinds(kinds: dict[str, Kind], *, as_json: bool) -> None:
    if as_json:
        print_json(
            [
                {
                    "kind": name,
                    "goal": kind.goal,
                    "models": list(kind.models),
                    "base": kind.base,
                    "methods": list(kind.methods),
                }
                for name, kind in kinds.items()
            ]
        )
        return
    from rich.table import Table

    table = Table()
    for column in ("kind", "what comes out", "from"):
        table.add_column(column)
    for name, kind in kinds.items():
        table.add_row(name, kind.goal, _from(kind))
    print_parts(table)


def _from(kind: Kind) -> str:
    """Say how many models a kind of recipe takes."""
    fewest, most = kind.models
    several = "" if fewest == most == 1 else "s"
    number = f"{fewest}" if fewest == most else f"{fewest} or more"
    base = {"required": "a base, ", "optional": "a base if wanted, ", "none": ""}[kind.base]
    return f"{base}{number} {kind.what}{several}"


def _asked(kind: Kind, answers: Answers) -> Answers:
    """Ask for what is not said yet."""
    base, models, method, dtype = answers.base, answers.models, answers.method, answers.dtype
    if kind.base != "none" and base is None:
        ends = "" if kind.base == "required" else ", Enter for none"
        default = None if kind.base == "required" else ""
        base = typer.prompt(f"Base model (folder or Hub id{ends})", default, show_default=False)
    fewest, most = kind.models
    while not answers.models and (most is None or len(models) < most):
        enough = len(models) >= fewest
        question = f"{kind.what.capitalize()} {len(models) + 1}"
        question += " (Enter ends)" if enough else " (folder or Hub id)"
        said = typer.prompt(question, "" if enough else None, show_default=False)
        if not said:
            break
        models = (*models, said)
    if kind.methods and method is None:
        method = typer.prompt(f"Method ({', '.join(kind.methods)})", kind.methods[0])
    experts = kind.experts(len(models))
    prompts = answers.prompts
    if experts and not prompts:
        prompts = _prompts_files(experts)
    if dtype is None:
        dtype = typer.prompt("Dtype (Enter: as the models)", "", show_default=False)
    return replace(
        answers,
        base=base or None,
        models=models,
        method=method,
        dtype=dtype or None,
        prompts=prompts,
    )


def _prompts_files(experts: int) -> tuple[str, ...]:
    """Ask for a prompts file for each expert; for none at all if there is none for the first."""
    files: list[str] = []
    for number in range(1, experts + 1):
        ends = "" if files else " (Enter for none)"
        default = None if files else ""
        said = typer.prompt(f"Prompts file for expert {number}{ends}", default, show_default=False)
        if not said:
            break
        files.append(said)
    return tuple(files)


def schema(
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="File to write (default: print it).")
    ] = None,
) -> None:
    """Print the JSON Schema of recipes, for editors."""
    with reporting():
        if out is None:
            from moeforge.recipe.json_schema import json_schema

            print_json(json_schema())
            return
        from moeforge.starter import write_schema

        print(write_schema(out))

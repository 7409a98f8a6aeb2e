"""Owns how starter recipes come to lie in a folder: nothing that is there is written over."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from moeforge.errors import BuildError, Finding, RecipeError
from moeforge.recipe.json_schema import json_schema
from moeforge.starter.rendering import Answers, depth_of, render
from moeforge.texts import expanded

SCHEMA_NAME = "moeforge.schema.json"
"""The schema beside a recipe; editors find it without a network, and it is of this version."""


def write(kind: str, answers: Answers, path: Path, *, force: bool = False) -> Path:
    """Write a starter recipe, and the schema that editors check it with beside it.

    Args:
        kind: one of `KINDS`.
        answers: what it is made of, nothing missing; paths are seen from the working directory.
        path: where to.
        force: write over what is there.

    Returns:
        Where the schema lies.

    Raises:
        RecipeError: `path` exists, or an answer has no place in a recipe.
        SourceError: a model must be looked at and cannot be.
        BuildError: the folder cannot be written.
    """
    if not force:
        refuse_existing(path)
    seen = _seen_from(path.parent, answers)
    text = render(
        kind,
        seen,
        file=str(path),
        schema=SCHEMA_NAME,
        beside=path.parent,
        depth=depth_of(kind, answers.models),
    )
    _write(path, text)
    return write_schema(path.parent / SCHEMA_NAME)


def refuse_existing(path: Path) -> None:
    """Refuse to write over a file.

    Raises:
        RecipeError: it exists.
    """
    if path.exists():
        fix = "Name another file with -o, or replace it with --force."
        raise RecipeError(Finding(f"{path} exists", fix))


def write_schema(path: Path) -> Path:
    """Write the JSON Schema of recipes.

    Raises:
        RecipeError: another file is there.
        BuildError: the folder cannot be written.
    """
    schema = json_schema()
    if path.exists() and _title(path) != schema["title"]:
        what = f"{path} exists, and is not the schema of recipes"
        raise RecipeError(Finding(what, "Name another file, or move that one."))
    _write(path, json.dumps(schema, indent=1, ensure_ascii=False) + "\n")
    return path


def _title(path: Path) -> str | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data.get("title") if isinstance(data, dict) else None


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        what = f"cannot write {path}: {error.strerror or error}"
        raise BuildError(Finding(what, "Name another place with -o.")) from None


def _seen_from(folder: Path, answers: Answers) -> Answers:
    """Return `answers` with local paths as a recipe in `folder` names them."""
    if folder.resolve() == Path.cwd():
        return answers

    def seen(name: str) -> str:
        local = (
            not Path(name).is_absolute() and not name.startswith("~") and expanded(name).exists()
        )
        try:
            return os.path.relpath(name, folder) if local else name
        except ValueError:  # on another drive
            return str(Path(name).resolve())

    return replace(
        answers,
        models=tuple(map(seen, answers.models)),
        base=answers.base and seen(answers.base),
        prompts=tuple(map(seen, answers.prompts)),
    )

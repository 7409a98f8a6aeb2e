"""Owns how a template and answers become the text of a recipe."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeforge import catalog, configs, tensors
from moeforge.errors import Finding, RecipeError, nearest
from moeforge.recipe import MergeRecipe, Reference, parse
from moeforge.recipe.placeholders import placeholders
from moeforge.sources import open_source
from moeforge.starter.kinds import KINDS, Kind
from moeforge.texts import expanded

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Answers:
    """What the user says.

    Attributes:
        models: folders or Hub ids of what is put together.
        base: the model that it is put onto.
        method: merge method; None for the kind's usual one.
        dtype: dtype of the result.
        factor: on what fine-tunes changed, once it is added up.
        prompts: a prompts file for each expert, or none at all.
        examples: prompts for each expert, written into the recipe; or none at all.
        evaluate: held-out text files by label.
    """

    models: tuple[str, ...] = ()
    base: str | None = None
    method: str | None = None
    dtype: str | None = None
    factor: float = 1.0
    prompts: tuple[str, ...] = ()
    examples: tuple[tuple[str, ...], ...] = ()
    evaluate: Mapping[str, str] = field(default_factory=dict)


def missing(kind: str, answers: Answers) -> list[Finding]:
    """Return what is missing, or given and of no use, for a recipe of this kind."""
    asked, found = KINDS[kind], []
    fewest, most = asked.models
    count = len(answers.models)
    if count < fewest or (most is not None and count > most):
        wanted = f"{fewest}" if fewest == most else f"at least {fewest}"
        what = f"{asked.what}s" if wanted != "1" else asked.what
        found.append(
            Finding(f"{kind} takes {wanted} {what}, got {count}", "Give --model for each of them.")
        )
    if asked.merges:
        listed = [*answers.models, *filter(None, [answers.base])]
        for twice in dict.fromkeys(name for name in listed if listed.count(name) > 1):
            found.append(Finding(f"{twice} is given twice", "Name each model once."))
    if asked.base == "required" and not answers.base:
        found.append(Finding(f"{kind} needs a base model", "Give it with --base."))
    if asked.base == "none" and answers.base:
        what = f"{kind} has no base beside its models, got --base {answers.base}"
        found.append(Finding(what, "Leave --base out."))
    if answers.method and answers.method not in asked.methods:
        known = asked.methods
        hint = f"{nearest(answers.method, known)} It takes {', '.join(known)}."
        what = f'{kind} cannot take the method "{answers.method}"{hint if known else ""}'
        found.append(Finding(what, "" if known else "Leave --method out."))
    if answers.prompts and len(answers.prompts) != asked.experts(count):
        what = f"{kind} of these models has {asked.experts(count)} experts, "
        what += f"got {len(answers.prompts)} prompts files"
        found.append(Finding(what, "Give --prompts once for each expert, or not at all."))
    if answers.dtype and answers.dtype not in tensors.OUTPUT_NAMES:
        what = f'unknown dtype "{answers.dtype}"{nearest(answers.dtype, tensors.OUTPUT_NAMES)}'
        found.append(Finding(f"{what} Known: {', '.join(tensors.OUTPUT_NAMES)}."))
    return found


def depth_of(kind: str, models: tuple[str, ...]) -> int | None:
    """Return how many layers all of `models` have; None where the kind has no use for it.

    Raises:
        RecipeError: a config does not say it.
        SourceError: a model cannot be opened.
        HubError: the Hub refused or could not be reached.
    """
    return min(map(_depth, models)) if KINDS[kind].depth else None


def render(
    kind: str, answers: Answers, *, file: str, schema: str, beside: Path, depth: int | None
) -> str:
    """Return the text of a recipe.

    Args:
        kind: one of `KINDS`.
        answers: what it is made of, nothing missing.
        file: what the recipe will be called, for the commands in its comments.
        schema: where editors find the schema, seen from the recipe.
        beside: the folder of the recipe, which local paths are seen from; it need not exist.
        depth: layers of the models, where the kind has a use for it.

    Raises:
        RecipeError: an answer has no place in a recipe.
    """
    import jinja2

    asked = KINDS[kind]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES, encoding="utf-8"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"scalar": scalar, "quoted": _quoted, "word": _word}
    environment.globals["placeholders"] = placeholders
    environment.filters["model"] = lambda name: _model(name, beside)
    body = environment.get_template(f"{kind}.yml.jinja").render(
        **_facts(asked, answers, file), **_layers(depth)
    )
    text = f"# yaml-language-server: $schema={schema}\n{body.strip()}\n"
    parse(text, beside, kind)  # so that no answer makes a recipe that is none
    return text


def _facts(kind: Kind, answers: Answers, file: str) -> dict[str, Any]:
    experts = kind.experts(len(answers.models))
    named = answers.models[:: kind.prompts] if kind.prompts else ()
    method = answers.method or next(iter(kind.methods), None)
    return {
        "file": shlex.quote(file),
        "models": answers.models,
        "base": answers.base,
        "dtype": answers.dtype,
        "factor": answers.factor,
        "evaluate": answers.evaluate,
        "files": answers.prompts or (None,) * experts,
        "examples": answers.examples or ((),) * experts,
        "names": [_name(model) for model in named],
        "method": method,
        "methods": [word for word in kind.methods if word != method],
        "chosen": catalog.load("methods", method, "METHOD") if method else None,
    }


def _layers(depth: int | None) -> dict[str, Any]:
    """Return depth, the layers that depth up-scaling cuts, and the ranges of a frankenmerge."""
    if depth is None:
        return {}
    # SOLAR leaves out 8 of 32 layers at either end.
    return {"depth": depth, "cut": depth // 4, "ranges": interleaved(depth)}


def interleaved(depth: int) -> list[tuple[int, int]]:
    """Return layer ranges to take from two models in turn, each a fifth of `depth` long.

    For 80 layers they are those of Goliath 120B. Models of few layers are cut in two.
    """
    if depth < 20:
        return [(0, depth - depth // 4), (depth // 4, depth)]
    tenths = [round(i * depth / 10) for i in range(11)]
    return [(tenths[i] + (i > 1), tenths[i + 2]) for i in range(9)]


def _depth(model: str) -> int:
    """Return the number of layers of `model`."""
    reference = _reference(model)
    source = open_source(reference.model, reference.revision, reference.subfolder)
    config = source.config
    depth = configs.n_layers(config) or configs.n_layers(config.get("text_config") or {})
    if depth is None:
        raise RecipeError(Finding(f"the config of {model} does not say how many layers it has"))
    return depth


def _reference(model: str) -> Reference:
    """Return `model` taken apart as in a recipe."""
    text = f"{{merge_method: passthrough, models: [{{model: {_model(model, Path())}}}]}}"
    try:
        recipe = parse(text, Path(), "model").recipe
    except RecipeError as error:  # of which line and path are those of no recipe that there is
        raise RecipeError(*(Finding(found.what, found.fix) for found in error.findings)) from None
    assert isinstance(recipe, MergeRecipe)
    reference: Reference = recipe.models[0].model
    return reference


# --- words in YAML -------------------------------------------------------------------------------


def scalar(text: str) -> str:
    """Return `text` as a value in YAML, with quotes unless nobody could read it otherwise."""
    plain = re.fullmatch(r"([A-Za-z]|\.{0,2}/|~/)[\w./@+-]*", text)
    reserved = text.lower() in ("true", "false", "yes", "no", "on", "off", "null", "y", "n")
    return text if plain and not reserved else _quoted(text)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _model(text: str, beside: Path) -> str:
    """Return a model as recipes name it; a folder may have a plus in its name."""
    if "+" in text and Path(os.path.normpath(beside / expanded(text))).exists():
        return f"{{model: {_quoted(text)}}}"
    return scalar(text)


def _name(model: str) -> str:
    """Return what to call a model in a sentence."""
    return re.split(r"[/\\]", model.partition("@")[0].rstrip("/\\"))[-1]


def _word(text: str) -> str:
    """Return `text` as a part of a file name in a comment."""
    return re.sub(r"[^\w.-]", "-", text)

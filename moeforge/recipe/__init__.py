"""Owns the way from a YAML file to a `Recipe`: the only room that knows pydantic and yaml."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moeforge.errors import Finding, RecipeError
from moeforge.recipe import document, prompts
from moeforge.recipe.document import Document
from moeforge.recipe.gating import GateParameters
from moeforge.recipe.kinds import average, parse_kind
from moeforge.recipe.mixture import NO_HOMES, REMOTE, Expert, LayerSource, MoeRecipe
from moeforge.recipe.prompts import Prompt
from moeforge.recipe.schema import (
    Adapter,
    Combination,
    MergeRecipe,
    Module,
    ModulesRecipe,
    Recipe,
    Reference,
    Slice,
    SliceSource,
    StackRecipe,
)
from moeforge.recipe.surgery import AVERAGE, ExtractRecipe, RegroupRecipe
from moeforge.recipe.tuning import Tuning
from moeforge.texts import expanded, read_text

__all__ = [
    "AVERAGE",
    "NO_HOMES",
    "REMOTE",
    "Adapter",
    "Combination",
    "Document",
    "Expert",
    "ExtractRecipe",
    "GateParameters",
    "LayerSource",
    "LoadedRecipe",
    "MergeRecipe",
    "Module",
    "ModulesRecipe",
    "MoeRecipe",
    "Prompt",
    "Recipe",
    "Reference",
    "RegroupRecipe",
    "Slice",
    "SliceSource",
    "StackRecipe",
    "Tuning",
    "average",
    "load",
    "parse",
    "parse_tuning",
]


_MOST = 2_000_000
"""Bytes of a recipe; the YAML reader takes many seconds for more."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe with what is needed to speak about it.

    Attributes:
        recipe: the validated recipe.
        document: its text and line numbers.
        folder: where relative paths are looked up first.
        stem: name of the file without its ending; the default name of the output.
        commits: for models on the Hub, the commit that is meant, where the recipe names none or a
            branch: what a lock file has written down.
    """

    recipe: Recipe
    document: Document
    folder: Path
    stem: str
    commits: Mapping[str, str] = field(default_factory=dict)

    def place(self, findings: Iterable[Finding]) -> tuple[Finding, ...]:
        """Return `findings` with the lines of the recipe they speak about, in their order."""
        placed = map(self.document.place, findings)
        return tuple(sorted(placed, key=lambda finding: finding.line or math.inf))

    def find(self, path: str) -> Path:
        """Return the file that a relative `path` means: beside the recipe, else from here."""
        beside = self.folder / expanded(path)
        return beside if beside.exists() else expanded(path)

    def expert_prompts(self, expert: Expert) -> tuple[Prompt, ...]:
        """Return the positive prompts of `expert`: those in the recipe, then its file's.

        Raises:
            ValueError: the file cannot be used.
        """
        inline = tuple(Prompt(text=text) for text in expert.positive_prompts)
        return inline + (
            prompts.load(self.find(expert.prompts_file)) if expert.prompts_file else ()
        )


def load(recipe: str | Path | dict[str, Any]) -> LoadedRecipe:
    """Read and validate a recipe.

    Args:
        recipe: path of a YAML file, or the same as a dict.

    Raises:
        RecipeError: with every mistake, each with its line, path and the nearest known word.
    """
    if isinstance(recipe, dict):
        text, folder, stem = document.dump(recipe), Path(), "merged"
    else:
        path = Path(recipe)
        try:
            text = read_text(path, most=_MOST)
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            odd = f"the byte {error.object[error.start]:#04x} is not UTF-8"
            what = f"cannot read the recipe {path}: {odd}"
            raise RecipeError(Finding(what, "Save it as UTF-8.", line=line)) from None
        except OSError as error:
            reason = error.strerror or error
            raise RecipeError(Finding(f"cannot read the recipe {path}: {reason}")) from None
        folder, stem = path.parent, path.stem
    parsed = document.parse(text)
    if isinstance(recipe, dict):  # nobody has seen its lines
        parsed = replace(parsed, lines={})
    return _validated(parsed, folder, stem)


def parse(text: str, folder: Path, stem: str) -> LoadedRecipe:
    """Validate the text of a recipe.

    Args:
        text: YAML.
        folder: where relative paths are looked up first.
        stem: default name of the output.

    Raises:
        RecipeError: with every mistake, each with its line, path and the nearest known word.
    """
    return _validated(document.parse(text), folder, stem)


def _validated(parsed: Document, folder: Path, stem: str) -> LoadedRecipe:
    try:
        valid = parse_kind(parsed.data)
    except ValidationError as error:
        placed = sorted(map(parsed.place, _findings(error)), key=lambda finding: finding.line)
        raise RecipeError(*placed) from None
    return LoadedRecipe(valid, parsed, folder, stem)


def parse_tuning(data: dict[str, Any]) -> Tuning:
    """Validate settings of a router tuning that come from elsewhere than a recipe.

    Raises:
        RecipeError: with every mistake.
    """
    try:
        return Tuning.model_validate(data)
    except ValidationError as error:
        raise RecipeError(*_findings(error)) from None


def _findings(error: ValidationError) -> list[Finding]:
    return [Finding(item["msg"], path=tuple(item["loc"])) for item in error.errors()]

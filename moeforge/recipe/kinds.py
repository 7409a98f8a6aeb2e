"""Owns which kind of recipe a document is: its keys say it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from moeforge.errors import closest
from moeforge.recipe.mixture import MoeRecipe
from moeforge.recipe.parameters import Condition
from moeforge.recipe.schema import MergeInput, MergeRecipe, ModulesRecipe, Recipe, StackRecipe
from moeforge.recipe.strict import wrong
from moeforge.recipe.surgery import ExtractRecipe, RegroupRecipe

KINDS: dict[str, type[Recipe]] = {
    "experts": MoeRecipe,
    "slices": StackRecipe,
    "models": MergeRecipe,
    "modules": ModulesRecipe,
    "extract": ExtractRecipe,
    "regroup": RegroupRecipe,
}
"""Which kind of recipe it is follows from its keys."""


def parse_kind(data: dict[str, Any]) -> Recipe:
    """Validate `data` as the kind of recipe that its keys say.

    Raises:
        ValidationError: with every mistake.
    """
    filled = [key for key in KINDS if data.get(key)]
    if filled:  # mergekit takes an empty list for a key that is not there
        data = {key: value for key, value in data.items() if key not in KINDS or key in filled}
    present = [key for key in KINDS if key in data]
    if not present:
        # Guess the kind from a misspelt key, so that the message can name the right word.
        fields = {name for kind in KINDS.values() for name in kind.model_fields}
        present = [
            found
            for key, value in data.items()
            if key not in fields and (found := closest(key, _like(value)))
        ]
    if len(present) == 1:
        return KINDS[present[0]].model_validate(data)
    got = f"got {' and '.join(present)}" if present else "got none of them"
    message = f"a recipe has exactly one of the keys {', '.join(KINDS)}; {got}"
    raise ValidationError.from_exception_data(
        "Recipe", [{"type": wrong(message), "loc": (), "input": None}]
    )


def _like(value: Any) -> list[str]:
    """Return the keys of KINDS that may have such a value: a mapping, or a list."""
    mappings = {"modules", "extract", "regroup"}
    return [key for key in KINDS if (key in mappings) == isinstance(value, dict)]


def parse_inline(data: dict[str, Any]) -> Recipe:
    """Validate a recipe that stands where a model may stand.

    Raises:
        ValidationError: with every mistake.
        PydanticCustomError: it is a mixture of experts.
    """
    inline = parse_kind(data)
    if isinstance(inline, MoeRecipe):
        raise wrong("a mixture of experts cannot be an input of another recipe")
    return inline


def average(models: Sequence[Any]) -> MergeRecipe:
    """Return the recipe of the plain average of `models`."""
    distinct = [model for i, model in enumerate(models) if model not in models[:i]]
    inputs = tuple(MergeInput(model=model) for model in distinct)
    weight = (Condition(1.0),)
    return MergeRecipe(merge_method="linear", models=inputs, parameters={"weight": weight})

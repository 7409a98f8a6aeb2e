"""Owns the recipe language of what is done to mixtures that are there: taking out, regrouping."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from moeforge.recipe.schema import Model, Recipe, Text
from moeforge.recipe.strict import Strict, Written, show, wrong

AVERAGE = "average"
"""The word for the average of all experts."""


def _number(value: Any) -> bool:
    return type(value) is int and value >= 0


def _expert(value: Any) -> Any:
    if value != AVERAGE and not _number(value):
        raise wrong(f'expected the number of an expert, from 0, or "{AVERAGE}", got {show(value)}')
    return value


def _keep(value: Any) -> Any:
    if not isinstance(value, (list, tuple)) or not value:
        raise wrong(f"expected a list of experts, got {show(value)}")
    lists = [list(entry) if isinstance(entry, (list, tuple)) else entry for entry in value]
    if all(map(_number, lists)):
        return tuple(lists)
    if not all(isinstance(entry, list) and entry and all(map(_number, entry)) for entry in lists):
        raise wrong(
            "expected numbers of experts, from 0, or a list of them for each layer that has any, "
            f"got {show(value)}"
        )
    if len({len(entry) for entry in lists}) > 1:
        raise wrong("every layer keeps as many experts as the others; these lists differ in length")
    return tuple(map(tuple, lists))


_INDEX: dict[str, Any] = {"type": "integer", "minimum": 0}
_NUMBERS = {"type": "array", "items": _INDEX, "minItems": 1}
_KEPT = {"anyOf": [_NUMBERS, {"type": "array", "items": _NUMBERS, "minItems": 1}]}


class Extraction(Strict):
    """What becomes of a mixture that is made dense.

    Attributes:
        model: the mixture.
        expert: the expert whose MLPs the dense model gets, from 0, or "average" of all of them.
        model_type: architecture of the result, where more than one holds it.
    """

    model: Model
    expert: Annotated[
        Any, BeforeValidator(_expert), Written({"anyOf": [_INDEX, {"const": AVERAGE}]})
    ]
    model_type: Text | None = None


class ExtractRecipe(Recipe):
    """A dense model out of a mixture of experts.

    Attributes:
        extract: what is taken out.
    """

    extract: Extraction


class Regrouping(Strict):
    """Which of its experts a mixture has, in a new order.

    Attributes:
        model: the mixture.
        keep: experts of the result, by their numbers in `model`; one that is listed twice is there
            twice. Or such a list for each layer with experts.
        experts_per_token: experts that each token passes through; None leaves it.
    """

    model: Model
    keep: Annotated[Any, BeforeValidator(_keep), Written(_KEPT)]
    experts_per_token: int | None = Field(default=None, ge=1)


class RegroupRecipe(Recipe):
    """A mixture with some of its own experts, each with its row of the router.

    Attributes:
        regroup: which experts it has.
    """

    regroup: Regrouping

"""Owns the recipe language of router tuning: the keys below `tune`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from moeforge.errors import Finding
from moeforge.recipe.schema import Finite, Text, or_no_entries
from moeforge.recipe.strict import Strict, Written, show, wrong


def _share(value: float) -> float:
    if not 0 <= value <= 1:
        raise wrong(f"expected a number from 0 to 1, got {show(value)}")
    return value


def _not_negative(value: float) -> float:
    if value < 0:
        raise wrong(f"expected a number that is not negative, got {show(value)}")
    return value


def _positive(value: float | None) -> float | None:
    if value is not None and value <= 0:
        raise wrong(f"expected a number above zero, got {show(value)}")
    return value


def _files(value: Any) -> Any:
    """Take one file for a list of one."""
    return (value,) if isinstance(value, str) else or_no_entries(value)


Files = Annotated[
    tuple[Text, ...],
    BeforeValidator(_files),
    Written(
        {
            "type": ["string", "array", "null"],
            "items": {"type": "string", "minLength": 1},
            "minLength": 1,
        }
    ),
]


class Tuning(Strict):
    """How the routers of a mixture are trained while everything else is frozen.

    Attributes:
        text: UTF-8 text files to train on, cut into windows.
        prompts: prompt files (`.txt`, `.jsonl`) to train on; without them and without `text` a
            recipe trains on the prompts of its experts.
        heldout: text files for early stopping; without them every tenth window or prompt.
        teach: 0 predicts the next token; 1 matches, document by document, the logits of the dense
            expert that predicts it best; between them is both.
        balance: factor on the load-balance loss.
        steps: optimiser steps.
        learning_rate: peak; None for 0.38 / hidden size.
        batch: documents per step.
        window: most tokens per document.
        patience: held-out measurements without a new best before training ends.
        active: experts per token while training, at least those of the mixture; None for these,
            and for 2 where the mixture has 1: the weight of a single expert is always one, and
            nothing could be learned from it.
    """

    text: Files = ()
    prompts: Files = ()
    heldout: Files = ()
    teach: Annotated[Finite, AfterValidator(_share)] = 0.0
    balance: Annotated[Finite, AfterValidator(_not_negative)] = 0.0
    steps: int = Field(default=200, ge=1)
    learning_rate: Annotated[Finite | None, AfterValidator(_positive)] = None
    batch: int = Field(default=16, ge=1)
    window: int = Field(default=256, ge=2)
    patience: int = Field(default=4, ge=1)
    active: int | None = Field(default=None, ge=1)


def problems(
    tuning: Tuning, find: Callable[[str], Path], *, has_prompts: bool
) -> tuple[Finding, ...]:
    """Return what stands against a recipe's `tune` before anything is built.

    Args:
        tuning: what the recipe says.
        find: the file that a relative path means.
        has_prompts: an expert of the recipe has prompts, which are trained on where no file is
            named.
    """
    found = [
        Finding(f"{name} does not exist", "Correct the path.", ("tune", key))
        for key in ("text", "prompts", "heldout")
        for name in getattr(tuning, key)
        if not find(name).is_file()
    ]
    if not tuning.text and not tuning.prompts and not has_prompts:
        fix = "Add text: or prompts: below tune, or prompts for the experts."
        found.append(Finding("there is no text to train the routers on", fix, ("tune",)))
    return tuple(found)

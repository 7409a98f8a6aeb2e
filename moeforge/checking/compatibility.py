"""Owns the comparison of a recipe's models, fact by fact, before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from moeforge.dense import hidden_size
from moeforge.planners.align import rows
from moeforge.planners.model import Model, fact, main_dtype

FACTS = {
    "family": "model_type",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate": "intermediate_size",
    "layers": "num_hidden_layers",
    "activation": "hidden_act",
    "rope theta": "rope_theta",
    "rope scaling": "rope_scaling",
    "positions": "max_position_embeddings",
    "norm eps": "rms_norm_eps",
}
"""What is compared, and the key of config.json that says it."""

MARK = "≠"


@dataclass(frozen=True)
class Comparison:
    """Facts of several models side by side.

    Attributes:
        labels: the models; the first is what the others are compared with.
        facts: for each fact, what each model says of it; None where its config says nothing.
    """

    labels: tuple[str, ...]
    facts: dict[str, tuple[Any, ...]]

    def odd(self, name: str) -> tuple[bool, ...]:
        """Say for each model whether it differs from the first in fact `name`."""
        first, *_ = values = self.facts[name]
        return tuple(value is not None and first is not None and value != first for value in values)

    @property
    def differs(self) -> bool:
        """Whether any model differs from the first in any fact."""
        return any(any(self.odd(name)) for name in self.facts)


def _head_dim(model: Model) -> Any:
    said, hidden = fact(model.config, "head_dim"), hidden_size(model.config)
    heads = fact(model.config, "num_attention_heads")
    if said is None and hidden and isinstance(heads, int) and heads > 0:
        return hidden // heads
    return said


def compare(models: Sequence[Model]) -> Comparison | None:
    """Return the models side by side, or None where there are fewer than two.

    Args:
        models: the models of a recipe, the base first.
    """
    if len(models) < 2:
        return None
    facts = {
        name: tuple(fact(model.config, key) for model in models) for name, key in FACTS.items()
    }
    facts["hidden"] = tuple(hidden_size(model.config) for model in models)
    facts["head_dim"] = tuple(map(_head_dim, models))
    facts["vocabulary"] = tuple(map(rows, models))
    facts["dtype"] = tuple(main_dtype(model.tensors.values()) or "none" for model in models)
    facts["tied head"] = tuple("yes" if model.tied else "no" for model in models)
    told = {name: values for name, values in facts.items() if any(v is not None for v in values)}
    return Comparison(tuple(model.label for model in models), told)


def comparison_json(found: Comparison) -> dict[str, Any]:
    """Return a comparison as plain data."""
    return {
        "labels": list(found.labels),
        "facts": {
            name: {"values": list(values), "odd": list(found.odd(name))}
            for name, values in found.facts.items()
        },
    }


def comparison_table(found: Comparison, labels: Sequence[str]) -> Table:
    """Return a comparison as a table in which odd cells carry a mark.

    Args:
        found: the comparison.
        labels: how to call the models.
    """
    table = Table(caption=f"{MARK} is not what the first model has", caption_justify="left")
    table.add_column("")
    for label in labels:
        table.add_column(Text(label), overflow="fold")
    for name, values in found.facts.items():
        cells = [
            Text(f"{MARK} {value}", style="bold red")
            if odd
            else Text("" if value is None else str(value))
            for value, odd in zip(values, found.odd(name), strict=True)
        ]
        table.add_row(name, *cells)
    return table

"""Owns what became of a recipe's parameters: the values per group of layers and tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from moeforge.checking.origins import spans
from moeforge.planners.model import NUMBERED, listing
from moeforge.plans import (
    ROUTERS,
    Affine,
    Concat,
    Dequantize,
    Expr,
    Fill,
    Lora,
    Merge,
    Plan,
    Read,
    inputs,
)
from moeforge.recipe import MoeRecipe, Recipe


@dataclass(frozen=True)
class Group:
    """Tensors that are made in the same way.

    Attributes:
        layers: their layers, as ranges; empty outside the layers.
        tensors: their names, without what stands before the layer's rest.
        made: method, parameters and models, in words.
    """

    layers: str
    tensors: tuple[str, ...]
    made: str


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _made(expr: Expr, layer: int | None) -> str:
    """Return in words what `expr` does; layers of inputs are written as distances from `layer`."""
    if isinstance(expr, Read):
        return _read(expr, layer)
    if isinstance(expr, Fill):
        return f"{expr.value:g} everywhere"
    if isinstance(expr, Concat):
        return " | ".join(dict.fromkeys(_made(piece, layer) for piece, _ in expr.pieces))
    if isinstance(expr, Affine):
        shift = f" + {expr.shift:g}" if expr.shift else ""
        return f"{expr.scale:g} x {_made(expr.input, layer)}{shift}"
    if isinstance(expr, Lora):
        return f"{_made(expr.weight, layer)} + {expr.scale:g} x {expr.a.source}"
    if isinstance(expr, Dequantize):
        return _made(expr.codes, layer)
    below = [_made(child, layer) for child in inputs(expr)]
    if not isinstance(expr, Merge):
        return ", ".join(dict.fromkeys(below))
    shared, own = [], [""] * len(below)
    for key, value in expr.params:
        if isinstance(value, tuple) and len(value) == len(below):
            for i, each in enumerate(value):
                own[i] += "" if each is None else f" {key} {_value(each)}"
        elif key != "key" and value is not None:
            shared.append(f"{key} {_value(value)}")
    said = [
        f"{model} ({mine.strip()})" if mine else model
        for model, mine in zip(below, own, strict=True)
    ]
    return f"{' '.join([expr.method, *shared])}: {', '.join(said)}"


def _read(read: Read, layer: int | None) -> str:
    if read.source == ROUTERS:
        return "made by the gate mode"
    match = NUMBERED.match(read.name)
    away = int(match["index"]) - layer if match and layer is not None else 0
    return f"{read.source}{f' (layer {away:+d})' if away else ''}"


def groups(plan: Plan) -> list[Group]:
    """Return how the tensors of a plan are made; layers and tensors made alike are one group."""
    ways: dict[tuple[int | None, str], list[str]] = {}
    everything: dict[int, int] = {}
    for tensor in plan.tensors:
        match = NUMBERED.match(tensor.name)
        layer = int(match["index"]) if match else None
        if layer is not None:
            everything[layer] = everything.get(layer, 0) + 1
        rest = (match["rest"] if match else tensor.name).removesuffix(".weight")
        ways.setdefault((layer, _made(tensor.expr, layer)), []).append(rest)
    alike: dict[tuple[tuple[str, ...], str], list[int]] = {}
    outside = []
    for (layer, made), names in ways.items():
        if layer is None:
            outside.append(Group("", tuple(names), made))
            continue
        whole = len(names) == everything[layer]
        alike.setdefault((("all",) if whole else tuple(names), made), []).append(layer)
    inside = [Group(spans(layers), names, made) for (names, made), layers in alike.items()]
    return [*outside, *inside]


def explained(plan: Plan, recipe: Recipe) -> dict[str, Any]:
    """Return the values of a recipe's parameters, and how its tensors are made, as plain data."""
    data: dict[str, Any] = {
        "groups": [
            {"layers": each.layers, "tensors": list(each.tensors), "made": each.made}
            for each in groups(plan)
        ]
    }
    if isinstance(recipe, MoeRecipe) and plan.experts:
        data["gates"] = {
            "gate_mode": recipe.gate_mode,
            "experts_per_token": recipe.experts_per_token,
            **recipe.gate_parameters.model_dump(mode="json"),
        }
        if data["gates"]["data"] is None:
            del data["gates"]["data"]
        data["experts"] = [
            {
                "model": label,
                "residual_scale": entry.residual_scale,
                "positive_prompts": len(entry.positive_prompts),
                "negative_prompts": len(entry.negative_prompts),
                "prompts_file": entry.prompts_file,
            }
            for label, entry in zip(plan.experts.labels, recipe.experts, strict=True)
        ]
    return data


def explained_tables(data: dict[str, Any]) -> list[Table]:
    """Return what `explained` found as tables."""
    made = Table(title="What each tensor is made of", title_justify="left")
    for column in ("layers", "tensors", "made of"):
        made.add_column(column, overflow="fold")
    for each in data["groups"]:
        made.add_row(Text(each["layers"]), Text(listing(each["tensors"], 4)), Text(each["made"]))
    tables = [made]
    if "gates" in data:
        gates = Table(show_header=False, title="Gates", title_justify="left")
        for key, value in data["gates"].items():
            gates.add_row(key, Text("chosen" if value is None else str(value)))
        experts = Table(title="Experts", title_justify="left")
        for column in data["experts"][0]:
            experts.add_column(column.replace("_", " "), overflow="fold")
        for each in data["experts"]:
            experts.add_row(*(Text("" if v is None else str(v)) for v in each.values()))
        tables += [gates, experts]
    return tables

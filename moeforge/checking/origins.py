"""Owns where output tensors come from and what of the inputs is left out, for people and JSON."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moeforge.errors import Finding, PlanError, nearest
from moeforge.planners.model import NUMBERED, listing
from moeforge.plans import (
    ROUTERS,
    Concat,
    Expr,
    Fill,
    Gather,
    Lora,
    Merge,
    Plan,
    PlannedTensor,
    Read,
    Rows,
    dump,
    inputs,
)
from moeforge.sources import lies

if TYPE_CHECKING:
    from rich.tree import Tree


def spans(numbers: Iterable[int]) -> str:
    """Return numbers as ranges: 0-3, 7."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def groups(left_out: Mapping[Read, str]) -> list[dict[str, Any]]:
    """Return what is left out by model and reason, layers as ranges, as plain data."""
    found: dict[tuple[str, str], list[str]] = {}
    for read, why in left_out.items():
        found.setdefault((read.source, why), []).append(read.name)
    result = []
    for (model, why), names in found.items():
        layers: dict[str, set[int]] = {}
        outside = []
        for name in names:
            if match := NUMBERED.match(name):
                layers.setdefault(match["stem"], set()).add(int(match["index"]))
            else:
                outside.append(name)
        where = [f"{stem}{spans(numbers)}" for stem, numbers in layers.items()]
        if outside:
            where.append(listing(outside))
        result.append({"model": model, "why": why, "tensors": len(names), "where": where})
    return result


def named(plan: Plan, pattern: str) -> list[PlannedTensor]:
    """Return the output tensors that `pattern` means: a name, or one with * and ?.

    Raises:
        PlanError: there is none.
    """
    found = [each for each in plan.tensors if fnmatch.fnmatchcase(each.name, pattern)]
    if found:
        return found
    names = [tensor.name for tensor in plan.tensors]
    hint = nearest(pattern, names) or f"; it has {listing(names)}"
    fix = "Write a name of the output, or a pattern such as '*.mlp.*'."
    raise PlanError(Finding(f"the output has no tensor {pattern}{hint}", fix))


def _leaf(plan: Plan, read: Read) -> dict[str, Any]:
    if read.source == ROUTERS:
        return {"reads": read.name, "model": "the gates, when they are made"}
    source = plan.sources[read.source]
    spec, span = source.specs()[read.name], lies(source, read.name)
    data: dict[str, Any] = {"reads": read.name, "model": read.source}
    data |= {"dtype": spec.dtype.name, "shape": list(spec.shape)}
    if span:
        data |= {"file": str(span.path), "bytes": [span.offset, span.offset + span.nbytes]}
    return data


def _node(plan: Plan, expr: Expr) -> dict[str, Any]:
    if isinstance(expr, Read):
        return _leaf(plan, expr)
    if isinstance(expr, Fill):
        return {"makes": f"{expr.value:g} everywhere"}
    if isinstance(expr, Concat):
        parts = [{**_node(plan, e), "makes_shape": list(spec.shape)} for e, spec in expr.pieces]
        return {"makes": "one after the other", "from": parts}
    below = [_node(plan, child) for child in inputs(expr)]
    if isinstance(expr, Merge):
        params = {key: value for key, value in expr.params if key != "key"}
        return {"makes": expr.method, "parameters": params, "from": below}
    if isinstance(expr, Lora):
        return {"makes": "LoRA", "parameters": {"scale": expr.scale}, "from": below}
    if isinstance(expr, Gather):
        count = len(expr.table.source) + expr.table.padding
        return {"makes": f"{count} rows in the order of the result's tokens", "from": below}
    if isinstance(expr, Rows):
        words = f"rows {expr.first} to {expr.first + expr.count}"
        return {"makes": words, "from": below}
    facts = dump(expr)
    word, *_ = facts
    return {"makes": word, "parameters": _scalars(facts), "from": below}


def _scalars(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if isinstance(value, (int, float))}


def traced(plan: Plan, pattern: str) -> list[dict[str, Any]]:
    """Return, for each output tensor that `pattern` means, what it is made of, down to bytes.

    Raises:
        PlanError: there is no such tensor.
    """
    return [
        {
            "name": tensor.name,
            "dtype": tensor.spec.dtype.name,
            "shape": list(tensor.spec.shape),
            "from": _node(plan, tensor.expr),
        }
        for tensor in named(plan, pattern)
    ]


def trees(found: Sequence[Mapping[str, Any]]) -> list[Tree]:
    """Return what `traced` found as trees."""
    from rich.markup import escape
    from rich.tree import Tree

    def add(tree: Tree, node: Mapping[str, Any]) -> None:
        shape = f" -> {node['makes_shape']}" if "makes_shape" in node else ""
        if "makes" in node:
            said = "  ".join(f"{key} {value}" for key, value in node.get("parameters", {}).items())
            branch = tree.add(escape(f"{node['makes']}  {said}".rstrip() + shape))
            for child in node.get("from", ()):
                add(branch, child)
            return
        text = f"{node['model']}: {node['reads']}"
        if "dtype" in node:
            text += f"  {node['dtype']} {node['shape']}"
        branch = tree.add(escape(text + shape))
        if "file" in node:
            start, end = node["bytes"]
            branch.add(escape(f"{node['file']}, bytes {start} to {end}"))

    made = []
    for each in found:
        tree = Tree(escape(f"{each['name']}  {each['dtype']} {each['shape']}"))
        add(tree, each["from"])
        made.append(tree)
    return made

"""Owns what checks and comparisons of checkpoints look like, as tables and as JSON."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from moeforge.proof.diff import OUTSIDE, Compared, Difference, Sums, together
from moeforge.proof.verify.checks import FAILED, OK, Verified

if TYPE_CHECKING:
    from moeforge.tensors import TensorSpec

_WORDS = {OK: "[green]ok[/]", FAILED: "[red]failed[/]"}
_SHOWN = 20
"""Tensors that only one model has or that have other shapes, named at most."""


def checks_table(found: Verified) -> Table:
    """Return the checks of a folder."""
    table = Table(box=None, pad_edge=False)
    for column in ("check", "result", "what was found"):
        table.add_column(column)
    for check in found.checks:
        table.add_row(check.name, _WORDS.get(check.state, check.state), escape(check.detail))
    return table


def checks_json(found: Verified) -> dict[str, Any]:
    """Return the checks of a folder as plain data."""
    return {
        "folder": str(found.folder),
        "ok": found.ok,
        "seconds": round(found.seconds, 3),
        "checks": [
            {
                "name": check.name,
                "state": check.state,
                "detail": check.detail,
                "findings": [finding.as_data() for finding in check.findings],
            }
            for check in found.checks
        ],
    }


def _number(value: float) -> float | None:
    """Return a float that JSON can hold."""
    return value if math.isfinite(value) else None


def _sums_json(sums: Sums) -> dict[str, float | None]:
    return {
        "cosine": _number(sums.cosine),
        "relative": _number(sums.relative),
        "largest": _number(sums.largest),
    }


def diff_json(found: Difference) -> dict[str, Any]:
    """Return a comparison as plain data: every tensor, and the layers."""

    def spec(of: TensorSpec | None) -> Any:
        return None if of is None else {"dtype": of.dtype.name, "shape": list(of.shape)}

    return {
        "a": found.a,
        "b": found.b,
        "same": found.same,
        "layers": {
            layer: _sums_json(together(t.sums for t in found.of(layer) if t.sums))
            for layer in found.layers
        },
        "tensors": [
            {
                "name": t.name,
                "equal": t.equal,
                "a": spec(t.a),
                "b": spec(t.b),
                **(_sums_json(t.sums) if t.sums else {}),
            }
            for t in found.tensors
        ],
    }


def _row(label: str, tensors: list[Compared]) -> list[str]:
    sums = together(t.sums for t in tensors if t.sums)
    equal = sum(t.equal for t in tensors)
    cells = [escape(label), str(len(tensors)), str(equal)]
    if not any(t.sums for t in tensors):
        return [*cells, "", "", ""]
    return [*cells, f"{sums.cosine:.6f}", f"{sums.relative:.2e}", f"{sums.largest:.2e}"]


def _table(first: str) -> Table:
    table = Table()
    table.add_column(first, overflow="fold")
    for column in ("tensors", "equal", "cosine", "‖A-B‖/‖A‖", "max |A-B|"):
        table.add_column(column, justify="right")
    return table


def diff_tables(found: Difference) -> list[str | Table]:
    """Return a comparison by layer and by kind, and what cannot be compared."""
    if found.same:
        return [f"all {len(found.tensors)} tensors are the same, byte for byte"]
    layers, kinds = _table("layer"), _table("kind")
    for layer in found.layers:
        layers.add_row(*_row(layer, found.of(layer)))
    layers.add_section()
    layers.add_row(*_row("all", list(found.tensors)), style="bold")
    for kind in found.kinds:
        every = [t for t in found.tensors if t.kind == kind and t.layer != OUTSIDE]
        kinds.add_row(*_row(kind, every))
    for tensor in found.of(OUTSIDE) if OUTSIDE in found.layers else []:
        kinds.add_row(*_row(tensor.name.removesuffix(".weight"), [tensor]))
    lines = [_odd(t) for t in found.tensors if not t.sums or t.a is None or t.b is None]
    lines += [_odd(t) for t in found.tensors if t.sums and t.a and t.b and t.a.dtype != t.b.dtype]
    if len(lines) > _SHOWN:
        lines = [*lines[:_SHOWN], f"and {len(lines) - _SHOWN} more; --json lists them"]
    return [escape(f"A: {found.a}\nB: {found.b}"), layers, kinds, *map(escape, lines)]


def _odd(tensor: Compared) -> str:
    """Say what is odd about a tensor that is not simply another one."""
    if tensor.b is None:
        return f"only in A: {tensor.name}, {tensor.a}"
    if tensor.a is None:
        return f"only in B: {tensor.name}, {tensor.b}"
    return f"{tensor.name}: {tensor.a} in A, {tensor.b} in B"

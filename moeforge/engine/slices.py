"""Owns how tensors are divided: into chunks, which workers take, and slices, which they hold."""

from __future__ import annotations

from collections.abc import Iterator

from moeforge import methods
from moeforge.methods import BLOCK, CHUNK, Place
from moeforge.plans import Dequantize, Expr, Lora, Merge, Plan, walk


def needs_rows(expr: Expr) -> bool:
    """Say whether anything in `expr` is computed row by row."""
    return any(
        isinstance(part, (Lora, Dequantize))
        or (isinstance(part, Merge) and methods.load(part.method).rows(dict(part.params)))
        for part in walk(expr)
    )


def unit(plan: Plan, expr: Expr) -> int:
    """Return the elements that slices of `expr` are multiples of.

    A block; or, where something needs whole rows, a group of them.
    """
    return Place(plan.shape(expr), 0).group if needs_rows(expr) else BLOCK


def spans(start: int, count: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield start and length of each part of [start, start + count) that `step` elements make.

    Of nothing there is one part.
    """
    for begin in range(start, start + max(count, 1), step):
        yield begin, min(step, start + count - begin)


def chunks(plan: Plan, expr: Expr, numel: int) -> Iterator[tuple[int, int]]:
    """Yield start and length of the chunks of `expr`, which has `numel` elements."""
    step = unit(plan, expr)
    yield from spans(0, numel, step * max(1, CHUNK // step))

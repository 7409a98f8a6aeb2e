"""Owns which parts of a tensor, and in which order its expressions, are looked at beforehand."""

from __future__ import annotations

from moeforge import methods
from moeforge.plans import Expr, Merge, inputs


def sample_runs(numel: int, length: int, most: int, row: int = 1) -> tuple[tuple[int, int], ...]:
    """Return runs of `length` elements, one at an irregular place in each of equal stretches.

    Args:
        numel: number of elements.
        length: elements per run, a multiple of `row`.
        most: number of runs.
        row: what places are multiples of.
    """
    stretch = numel / most
    if length >= stretch:
        return ((0, numel),)
    starts = (int((i + (i * 0.6180339887) % 1.0) * stretch) // row * row for i in range(most))
    return tuple((min(start, numel - length), length) for start in starts)


def measured_levels(expr: Expr) -> list[list[Merge]]:
    """Return the expressions whose method measures, innermost first, by level of nesting."""
    levels: list[list[Merge]] = []

    def visit(node: Expr) -> int:
        depth = max((visit(child) for child in inputs(node)), default=0)
        if isinstance(node, Merge) and methods.load(node.method).measure:
            while len(levels) <= depth:
                levels.append([])
            if not any(node is other for other in levels[depth]):
                levels[depth].append(node)
            return depth + 1
        return depth

    visit(expr)
    return levels

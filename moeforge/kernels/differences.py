"""Owns differences from a base: their magnitudes, and sums of them, sparsified and elected."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeforge.kernels import counting
from moeforge.kernels.bits import unpack
from moeforge.kernels.combining import combine
from moeforge.kernels.drawing import ALL, words_of
from moeforge.kernels.rows import (
    ONE,
    STRETCH,
    ZERO,
    borrowed,
    compiled,
    rows_of,
    subtract,
    wide,
    widen,
)


@compiled
def deltas(matrix: Any, out: Any) -> None:
    """Put the differences from the first row into `out` [inputs − 1, elements or more]."""
    room = np.empty(STRETCH, np.float32)
    for start in range(0, matrix.shape[1], STRETCH):
        end = min(start + STRETCH, matrix.shape[1])
        base = room[: end - start]
        widen(matrix[0, start:end], base)
        for i in range(1, matrix.shape[0]):
            row = out[i - 1, start:end]
            widen(matrix[i, start:end], row)
            subtract(row, base)


# What becomes of one model's differences, in a single loop each.


@compiled
def _multiply(row: Any, base: Any, factor: Any, part: Any) -> None:
    for j in range(part.size):
        part[j] = (wide(row[j]) - base[j]) * factor


@compiled
def _trim(row: Any, base: Any, bound: Any, factor: Any, part: Any) -> None:
    for j in range(part.size):
        value = wide(row[j]) - base[j]
        part[j] = (ZERO if abs(value) <= bound else value) * factor


@compiled
def _window(row: Any, base: Any, bound: Any, outer: Any, factor: Any, part: Any) -> None:
    for j in range(part.size):
        value = wide(row[j]) - base[j]
        value = ZERO if abs(value) <= bound else value
        part[j] = (value - (ZERO if abs(value) <= outer else value)) * factor


@compiled
def _mask(row: Any, base: Any, kept: Any, factor: Any, part: Any) -> None:
    for j in range(part.size):
        part[j] = (wide(row[j]) - base[j]) * np.float32(kept[j]) * factor


@compiled
def _draw(row: Any, base: Any, drawn: Any, limit: Any, factor: Any, part: Any) -> None:
    # Multiplied, and not chosen: what is dropped keeps its sign.
    for j in range(part.size):
        part[j] = (wide(row[j]) - base[j]) * (ONE if drawn[j] < limit else ZERO) * factor


@compiled
def _across(
    row: Any, base: Any, inner: Any, outer: Any, bounds: Any, factor: Any, part: Any
) -> None:
    """Do as `_window` where bounds [2, 2] change at elements `inner` and `outer`."""
    for j in range(row.size):
        low, high = bounds[0, 0 if j < inner else 1], bounds[1, 0 if j < outer else 1]
        here = slice(j, j + 1)
        _window(row[here], base[here], low, high, factor, part[here])


@compiled
def _task(
    matrix: Any,
    borders: Any,
    bounds: Any,
    kept: Any,
    start: Any,
    keys: Any,
    limits: Any,
    sparse: Any,
    factors: Any,
    weights: Any,
    how: Any,
    room: Any,
    out: Any,
) -> None:
    matrix, kept, out, parts = borrowed(matrix), borrowed(kept), borrowed(out), borrowed(room[0])
    base, words, chosen = borrowed(room[1]), borrowed(room[2]), borrowed(room[3])
    models = matrix.shape[0] - 1
    parts[models:] = -ZERO
    draws = words.view(np.int16)
    for begin in range(0, matrix.shape[1], STRETCH):
        end = min(begin + STRETCH, matrix.shape[1])
        size = end - begin
        first = (start + begin) // 4
        drawn = draws[start + begin - 4 * first :][:size]
        origin = base[:size]
        widen(matrix[0, begin:end], origin)
        for i in range(models):
            row, part, factor = matrix[i + 1, begin:end], parts[i, :size], factors[i]
            if kept.size:
                unpack(kept[i, begin // 8 : (end + 7) // 8], chosen)
                _mask(row, origin, chosen, factor, part)
            elif keys.size and limits[i] < ALL:
                words_of(keys[i], first, words)
                _draw(row, origin, drawn, limits[i], factor, part)
            elif sparse:
                inner, outer = borders[i, 0] - begin, borders[i, 1] - begin
                low = bounds[i, 0, 0 if inner >= size else 1]
                high = bounds[i, 1, 0 if outer >= size else 1]
                if 0 < inner < size or 0 < outer < size:
                    _across(row, origin, inner, outer, bounds[i], factor, part)
                elif high < np.inf:
                    _window(row, origin, low, high, factor, part)
                else:
                    _trim(row, origin, low, factor, part)
            else:
                _multiply(row, origin, factor, part)
        combine(parts, origin, weights, how, out[begin:end])


def task(
    matrix: Any,
    borders: Any,
    bounds: Any,
    kept: Any,
    start: Any,
    keys: Any,
    limits: Any,
    sparse: Any,
    factors: Any,
    weights: Any,
    consensus: Any,
    normalize: Any,
    equal: Any,
    divisor: Any,
    step: Any,
    out: Any,
) -> None:
    """Put the base plus sparsified, weighted differences from it into `out` [elements].

    Args:
        matrix: base and models.
        borders: int64 [models, 2]: elements before which the first of two bounds holds.
        bounds: float32 [models, 2, 2]: differences up to the bound, in magnitude, become zero; of
            the small ones, and of the outliers; before the border and from it on.
        kept: uint8 [models, elements / 8], bits that differences are multiplied with instead; or
            [0, 0].
        start: number of the first element.
        keys: uint64 [models], by which differences are drawn instead; or [0].
        limits: int32 [models], below which draws are kept; ALL for everything.
        sparse: whether there are bounds.
        factors: float32 [models], what they are multiplied with then.
        weights: float32 [models], of models that take part in an election.
        consensus: elect signs.
        normalize: divide by the sum of weights: of those that take part in an election, else by
            `divisor`.
        equal: whether all weights are equal.
        divisor: float32; one where there is an election.
        step: float32, what the sum is multiplied with.
        out: float32; or uint16, for bits of bfloat16.
    """
    parts, base = rows_of(max(matrix.shape[0] - 1, 3)), rows_of(1)[0]
    words = np.empty(STRETCH // 4 + 1, np.uint64)
    room = (parts, base, words, np.empty(STRETCH, np.uint8))
    how = (consensus, normalize, equal, divisor, step)
    _task(
        matrix, borders, bounds, kept, start, keys, limits, sparse, factors, weights, how, room, out
    )


def warm(kind: Any) -> None:
    """Have everything compiled for matrices of numpy dtype `kind`."""
    matrix: Any = np.zeros((2, 2), kind)
    out = np.zeros((1, 2), np.float32)
    deltas(matrix, out)
    counting.warm(kind)
    arrays = (np.zeros((1, 2), np.int64), np.zeros((1, 2, 2), np.float32))
    one = np.ones(1, np.float32)
    kept, drawn = np.zeros((0, 0), np.uint8), (np.zeros(0, np.uint64), np.zeros(0, np.int32))
    for result in (out[0], np.zeros(2, np.uint16)):
        task(
            *(matrix, *arrays, kept, 0, *drawn, True, one, one, True, True, True, ONE, ONE, result)
        )

"""Owns differences from a base: their magnitudes, and sums of them, sparsified and elected."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeforge.kernels import counting
from moeforge.kernels.bits import unpack
from moeforge.kernels.drawing import ALL, words_of
from moeforge.kernels.rows import (
    ONE,
    STRETCH,
    ZERO,
    compiled,
    majority,
    store,
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


# What becomes of one model's differences, in a single loop each: little is stored on the way.


@compiled
def _add_differences(row: Any, base: Any, factor: Any, total: Any) -> None:
    for j in range(total.size):
        total[j] += (wide(row[j]) - base[j]) * factor


@compiled
def _trim(row: Any, base: Any, bound: Any, factor: Any, part: Any, total: Any) -> None:
    for j in range(part.size):
        value = wide(row[j]) - base[j]
        value = (ZERO if abs(value) <= bound else value) * factor
        part[j] = value
        total[j] += value


@compiled
def _window(
    row: Any, base: Any, bound: Any, outer: Any, factor: Any, part: Any, total: Any
) -> None:
    for j in range(part.size):
        value = wide(row[j]) - base[j]
        value = ZERO if abs(value) <= bound else value
        value = (value - (ZERO if abs(value) <= outer else value)) * factor
        part[j] = value
        total[j] += value


@compiled
def _mask(row: Any, base: Any, kept: Any, factor: Any, part: Any, total: Any) -> None:
    for j in range(part.size):
        value = (wide(row[j]) - base[j]) * np.float32(kept[j]) * factor
        part[j] = value
        total[j] += value


@compiled
def _draw(row: Any, base: Any, drawn: Any, limit: Any, factor: Any, part: Any, total: Any) -> None:
    # Multiplied, and not chosen: what is dropped keeps its sign.
    for j in range(part.size):
        value = (wide(row[j]) - base[j]) * (ONE if drawn[j] < limit else ZERO) * factor
        part[j] = value
        total[j] += value


@compiled
def _across(
    row: Any, base: Any, inner: Any, outer: Any, bounds: Any, factor: Any, part: Any, total: Any
) -> None:
    """Do as `_window` where bounds [2, 2] change at elements `inner` and `outer`."""
    for j in range(row.size):
        low, high = bounds[0, 0 if j < inner else 1], bounds[1, 0 if j < outer else 1]
        here = slice(j, j + 1)
        _window(row[here], base[here], low, high, factor, part[here], total[here])


@compiled
def _add_agreeing(total: Any, taking: Any, row: Any, sign: Any, weight: Any) -> None:
    for j in range(row.size):
        value = row[j] * sign[j]
        value = ZERO if value < ZERO else value
        total[j] += value
        taking[j] += weight if value > ZERO else ZERO


@compiled
def _add_to_base(base: Any, total: Any, divisor: Any, step: Any, out: Any) -> None:
    if divisor == ONE:
        for j in range(base.size):
            store(out, j, base[j] + total[j] * step)
    else:
        for j in range(base.size):
            store(out, j, base[j] + (total[j] / divisor) * step)


@compiled
def _divide(total: Any, sign: Any, divisor: Any, normalize: Any, equal: Any, weight: Any) -> None:
    """Turn sums of what agrees into the election's result, in `total`."""
    if not normalize:
        for j in range(total.size):
            total[j] = total[j] * sign[j]
    elif equal:
        # Where nobody takes part the result is zero, whatever it is divided by.
        for j in range(total.size):
            total[j] = total[j] * (sign[j] / (max(divisor[j], ONE) * weight))
    else:
        for j in range(total.size):
            total[j] = total[j] * (sign[j] / (divisor[j] + (ONE if divisor[j] == ZERO else ZERO)))


@compiled
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
    models = matrix.shape[0] - 1
    parts = np.empty((models, STRETCH), np.float32)
    room = np.empty((4, STRETCH), np.float32)
    words = np.empty(STRETCH // 4 + 1, np.uint64)
    drawn, chosen = words.view(np.int16), np.empty(STRETCH, np.uint8)
    for begin in range(0, matrix.shape[1], STRETCH):
        end = min(begin + STRETCH, matrix.shape[1])
        size = end - begin
        first = (start + begin) // 4
        odd = start + begin - 4 * first
        base, total, sign, taking = room[0, :size], room[1, :size], room[2, :size], room[3, :size]
        for j in range(size):
            total[j] = -ZERO  # to which adding anything changes nothing, not even a negative zero
        widen(matrix[0, begin:end], base)
        for i in range(models):
            row, part = matrix[i + 1, begin:end], parts[i, :size]
            if kept.size:
                unpack(kept[i, begin // 8 : (end + 7) // 8], chosen)
                _mask(row, base, chosen, factors[i], part, total)
            elif keys.size and limits[i] < ALL:
                words_of(keys[i], first, words)
                here = drawn[odd : odd + size]
                _draw(row, base, here, limits[i], factors[i], part, total)
            elif consensus or sparse:
                inner, outer = borders[i, 0] - begin, borders[i, 1] - begin
                low = bounds[i, 0, 0 if inner >= size else 1]
                high = bounds[i, 1, 0 if outer >= size else 1]
                if 0 < inner < size or 0 < outer < size:
                    _across(row, base, inner, outer, bounds[i], factors[i], part, total)
                elif high < np.inf:
                    _window(row, base, low, high, factors[i], part, total)
                else:
                    _trim(row, base, low, factors[i], part, total)
            else:
                _add_differences(row, base, factors[i], total)
        if consensus:
            majority(total, sign)
            for j in range(size):
                total[j], taking[j] = -ZERO, ZERO
            for i in range(models):
                weight = ONE if equal else weights[i]
                _add_agreeing(total, taking, parts[i, :size], sign, weight)
            _divide(total, sign, taking, normalize, equal, weights[0])
        _add_to_base(base, total, divisor, step, out[begin:end])


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

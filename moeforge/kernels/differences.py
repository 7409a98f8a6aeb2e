"""Owns differences from a base: their magnitudes, and sums of them, sparsified and elected."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeforge.kernels.rows import (
    ONE,
    STRETCH,
    ZERO,
    compiled,
    majority,
    subtract,
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


@compiled
def _absolute_difference(row: Any, base: Any) -> None:
    for j in range(row.size):
        row[j] = abs(row[j] - base[j])


@compiled
def magnitudes(matrix: Any, which: Any, out: Any) -> None:
    """Put the magnitudes of the differences of rows `which` from the first into rows of `out`."""
    room = np.empty(STRETCH, np.float32)
    for start in range(0, matrix.shape[1], STRETCH):
        end = min(start + STRETCH, matrix.shape[1])
        base = room[: end - start]
        widen(matrix[0, start:end], base)
        for i in range(which.size):
            row = out[i, start:end]
            widen(matrix[which[i], start:end], row)
            _absolute_difference(row, base)


@compiled
def _reaching(values: Any, stop: Any) -> Any:
    count = np.int32(0)
    for j in range(values.size):
        count += np.int32(values[j] >= stop)
    return count


@compiled
def _collect(bits: Any, first: Any, width: Any, out: Any, count: Any) -> Any:
    # Every element is written, and the next one over it unless it is to stay: no branch to miss.
    for j in range(bits.size):
        out[count] = bits[j]
        count += np.uint64(np.uint32(bits[j] - first) < width)
    return count


@compiled
def tally(values: Any, first: Any, stop: Any, out: Any) -> Any:
    """Collect the magnitudes from `first` on and below `stop` into `out`, in their order.

    Args:
        values: [elements], not negative.
        first: float32, finite.
        stop: float32, may be infinite.
        out: as long as `values`, and one more.

    Returns:
        How many are `stop` or more, and how many were collected.
    """
    ends = np.empty(2, np.float32)
    ends[0], ends[1] = first, stop
    bits, room, limits = values.view(np.uint32), out.view(np.uint32), ends.view(np.uint32)
    width = np.uint32(limits[1] - limits[0])
    reached, count = 0, np.uint64(0)
    for start in range(0, values.size, STRETCH):
        end = min(start + STRETCH, values.size)
        reached += _reaching(values[start:end], stop)
        count = _collect(bits[start:end], limits[0], width, room, count)
    return reached, count


@compiled
def _trim(row: Any, base: Any, bound: Any) -> None:
    for j in range(row.size):
        value = row[j] - base[j]
        row[j] = ZERO if abs(value) <= bound else value


@compiled
def _without_outliers(row: Any, bound: Any) -> None:
    for j in range(row.size):
        row[j] = row[j] - (ZERO if abs(row[j]) <= bound else row[j])


@compiled
def _masked(row: Any, kept: Any) -> None:
    for j in range(row.size):
        row[j] = row[j] * np.float32(kept[j])


@compiled
def _add_scaled(total: Any, row: Any, factor: Any) -> None:
    for j in range(row.size):
        row[j] = row[j] * factor
        total[j] += row[j]


@compiled
def _add_agreeing(total: Any, taking: Any, row: Any, sign: Any, weight: Any) -> None:
    for j in range(row.size):
        value = row[j] * sign[j]
        value = ZERO if value < ZERO else value
        total[j] += value
        taking[j] += weight if value > ZERO else ZERO


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
    outliers: Any,
    kept: Any,
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
        outliers: whether differences beyond the second pair of bounds become zero, too.
        kept: uint8 [models, elements], what else differences are multiplied with; or [0, 0].
        factors: float32 [models], then.
        weights: float32 [models], of models that take part in an election.
        consensus: elect signs.
        normalize: divide by the sum of weights: of those that take part in an election, else by
            `divisor`.
        equal: whether all weights are equal.
        divisor: float32; one where there is an election.
        step: float32, what the sum is multiplied with.
        out: float32.
    """
    models = matrix.shape[0] - 1
    parts = np.empty((models, STRETCH), np.float32)
    room = np.empty((4, STRETCH), np.float32)
    for start in range(0, matrix.shape[1], STRETCH):
        end = min(start + STRETCH, matrix.shape[1])
        size = end - start
        base, total, sign, taking = room[0, :size], room[1, :size], room[2, :size], room[3, :size]
        total[:] = -ZERO  # to which adding anything changes nothing, not even a negative zero
        widen(matrix[0, start:end], base)
        for i in range(models):
            row = parts[i, :size]
            widen(matrix[i + 1, start:end], row)
            border = min(max(borders[i, 0] - start, 0), size)
            _trim(row[:border], base[:border], bounds[i, 0, 0])
            _trim(row[border:], base[border:], bounds[i, 0, 1])
            if outliers:
                border = min(max(borders[i, 1] - start, 0), size)
                _without_outliers(row[:border], bounds[i, 1, 0])
                _without_outliers(row[border:], bounds[i, 1, 1])
            if kept.size:
                _masked(row, kept[i, start:end])
            _add_scaled(total, row, factors[i])
        if consensus:
            sign[:] = total
            majority(sign)
            total[:] = -ZERO
            taking[:] = ZERO
            for i in range(models):
                weight = ONE if equal else weights[i]
                _add_agreeing(total, taking, parts[i, :size], sign, weight)
            _divide(total, sign, taking, normalize, equal, weights[0])
        result = out[start:end]
        for j in range(size):
            result[j] = base[j] + (total[j] / divisor) * step


def warm(kind: Any) -> None:
    """Have everything compiled for matrices of numpy dtype `kind`."""
    matrix: Any = np.zeros((2, 2), kind)
    out = np.zeros((1, 2), np.float32)
    deltas(matrix, out)
    magnitudes(matrix, np.ones(1, np.int64), out)
    tally(out[0], ZERO, ONE, np.zeros(3, np.float32))
    arrays = (np.zeros((1, 2), np.int64), np.zeros((1, 2, 2), np.float32))
    one = np.ones(1, np.float32)
    kept = np.zeros((0, 0), np.uint8)
    task(matrix, *arrays, False, kept, one, one, True, True, True, ONE, ONE, out[0])

"""Owns what `sce` needs: how much differences from a base vary over models, and its merge."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeforge.kernels.rows import (
    ONE,
    STRETCH,
    ZERO,
    add,
    compiled,
    majority,
    store,
    subtract,
    widen,
)


@compiled
def _differences(matrix: Any, start: Any, end: Any, base: Any, parts: Any) -> None:
    widen(matrix[0, start:end], base)
    for i in range(1, matrix.shape[0]):
        row = parts[i - 1, : base.size]
        widen(matrix[i, start:end], row)
        subtract(row, base)


@compiled
def _variance_of_three(one: Any, two: Any, three: Any, out: Any) -> None:
    """Do as `_variance`, in one loop, for as many models as are merged most often."""
    count = np.float32(3.0)
    for j in range(out.size):
        mean = (one[j] + two[j] + three[j] + ZERO) / count
        a, b, c = one[j] - mean, two[j] - mean, three[j] - mean
        out[j] = (a * a + b * b + c * c + ZERO) / count


@compiled
def _variance(parts: Any, mean: Any, out: Any) -> None:
    # Zeros are added because a sum of negative zeros is to be a positive one.
    size, count = out.size, np.float32(parts.shape[0])
    if parts.shape[0] == 3:
        _variance_of_three(parts[0, :size], parts[1, :size], parts[2, :size], out)
        return
    first = parts[0, :size]
    mean[:] = first
    for i in range(1, parts.shape[0]):
        add(mean, parts[i, :size])
    for j in range(size):
        mean[j] = (mean[j] + ZERO) / count
        out[j] = (first[j] - mean[j]) * (first[j] - mean[j])
    for i in range(1, parts.shape[0]):
        row = parts[i, :size]
        for j in range(size):
            out[j] += (row[j] - mean[j]) * (row[j] - mean[j])
    for j in range(size):
        out[j] = (out[j] + ZERO) / count


@compiled
def variances(matrix: Any, out: Any) -> None:
    """Put the population variance of the differences from the first row into `out` [elements]."""
    parts = np.empty((matrix.shape[0] - 1, STRETCH), np.float32)
    room = np.empty((2, STRETCH), np.float32)
    for start in range(0, matrix.shape[1], STRETCH):
        end = min(start + STRETCH, matrix.shape[1])
        _differences(matrix, start, end, room[0, : end - start], parts)
        _variance(parts, room[1, : end - start], out[start:end])


@compiled
def varied(matrix: Any) -> Any:
    """Return of how many elements the differences from the first row vary at all."""
    parts = np.empty((matrix.shape[0] - 1, STRETCH), np.float32)
    room, count = np.empty((3, STRETCH), np.float32), 0
    for start in range(0, matrix.shape[1], STRETCH):
        end = min(start + STRETCH, matrix.shape[1])
        size = end - start
        _differences(matrix, start, end, room[0, :size], parts)
        _variance(parts, room[1, :size], room[2, :size])
        count += _nonzero(room[2, :size])
    return count


@compiled
def _nonzero(values: Any) -> Any:
    count = np.int32(0)
    for j in range(values.size):
        count += np.int32(values[j] != ZERO)
    return count


@compiled
def _choose(variance: Any, value: Any, inclusive: Any) -> None:
    if inclusive:
        for j in range(variance.size):
            variance[j] = ONE if variance[j] >= value else ZERO
    else:
        for j in range(variance.size):
            variance[j] = ONE if variance[j] > value else ZERO


@compiled
def _varying(parts: Any, size: Any, room: Any, value: Any, border: Any) -> None:
    """Set what varies less than `value` to zero; as much as it, too, from element `border` on."""
    variance = room[1, :size]
    _variance(parts, room[0, :size], variance)
    border = min(max(border, 0), size)
    _choose(variance[:border], value, True)
    _choose(variance[border:], value, False)
    for i in range(parts.shape[0]):
        row = parts[i, :size]
        for j in range(size):
            row[j] = row[j] * variance[j]


@compiled
def selected(matrix: Any, value: Any, border: Any, out: Any) -> None:
    """Put those differences from the first row that vary most over models into `out`.

    Args:
        matrix: base and models.
        value: float32 variance; elements of a smaller one become zero.
        border: element from which on those of just this variance do, too.
        out: float32 [models, elements].
    """
    parts = np.empty((matrix.shape[0] - 1, STRETCH), np.float32)
    room = np.empty((3, STRETCH), np.float32)
    for start in range(0, matrix.shape[1], STRETCH):
        end = min(start + STRETCH, matrix.shape[1])
        _differences(matrix, start, end, room[2, : end - start], parts)
        _varying(parts, end - start, room, value, border - start)
        for i in range(parts.shape[0]):
            out[i, start:end] = parts[i, : end - start]


@compiled
def _agreeing(row: Any, sign: Any) -> None:
    """Turn `row` into its magnitudes where it has this sign, zero elsewhere."""
    for j in range(row.size):
        value = row[j] * sign[j]
        row[j] = ZERO if value < ZERO else value


@compiled
def _add_quotient(out: Any, base: Any, total: Any, sign: Any, divisor: Any, step: Any) -> None:
    """Put base + total · (sign / divisor) · step into `out`."""
    for j in range(base.size):
        store(out, j, base[j] + total[j] * (sign[j] / divisor[j]) * step)


@compiled
def _add_terms(total: Any, divisor: Any, row: Any, weight: Any) -> None:
    for j in range(row.size):
        total[j] += row[j] * weight
        divisor[j] += weight if row[j] > ZERO else ZERO


@compiled
def sce(
    matrix: Any, value: Any, border: Any, weights: Any, least: Any, everything: Any, out: Any
) -> None:
    """Put base + Σ wᵢ·δᵢ / Σ wᵢ into `out`, over the models whose sign is that of Σ δ.

    Args:
        matrix: base and models.
        value: as in `selected`.
        border: as in `selected`.
        weights: float32 [models].
        least: float32, what Σ wᵢ is at least.
        everything: nothing is deselected.
        out: float32 [elements]; or uint16, for bits of bfloat16.
    """
    models = matrix.shape[0] - 1
    parts = np.empty((models, STRETCH), np.float32)
    room = np.empty((4, STRETCH), np.float32)
    for start in range(0, matrix.shape[1], STRETCH):
        end = min(start + STRETCH, matrix.shape[1])
        size = end - start
        base, sign = room[2, :size], room[3, :size]
        _differences(matrix, start, end, base, parts)
        if not everything:
            _varying(parts, size, room, value, border - start)
        total, divisor = room[0, :size], room[1, :size]
        total[:] = parts[0, :size]
        for i in range(1, models):
            add(total, parts[i, :size])
        majority(total, sign)
        # A sum of negative zeros becomes a positive one, as it is added to a positive zero.
        total[:] = ZERO
        divisor[:] = ZERO
        for i in range(models):
            row = parts[i, :size]
            _agreeing(row, sign)
            _add_terms(total, divisor, row, weights[i])
        for j in range(size):
            divisor[j] = max(divisor[j], least)
        _add_quotient(out[start:end], base, total, sign, divisor, ONE)


def warm(kind: Any) -> None:
    """Have everything compiled for matrices of numpy dtype `kind`."""
    matrix: Any = np.zeros((2, 2), kind)
    out = np.zeros((1, 2), np.float32)
    variances(matrix, out[0])
    selected(matrix, ZERO, 0, out)
    varied(matrix)
    for result in (out[0], np.zeros(2, np.uint16)):
        sce(matrix, ZERO, 0, np.ones(1, np.float32), ONE, False, result)

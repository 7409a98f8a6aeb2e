"""Owns what `model_stock` needs: inner products of differences from a base, and its merge."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeforge.kernels.rows import (
    PADDED,
    STRETCH,
    ZERO,
    add,
    compiled,
    rows_of,
    store,
    subtract,
    wide,
    widen,
)


@compiled
def _add_products(lanes: Any, one: Any, other: Any) -> None:
    for j in range(one.size):
        lanes[j] += one[j] * other[j]


@compiled
def _difference(values: Any, base: Any, room: Any, out: Any) -> None:
    """Put a difference, made in float32 `room`, into float64 `out`."""
    widen(values, room)
    for j in range(out.size):
        out[j] = np.float64(room[j] - base[j])


@compiled
def _add_of_three(base: Any, one: Any, two: Any, three: Any, sums: Any) -> None:
    # In one array, a known distance apart: compiled for vectors without asking where they lie.
    for j in range(base.size):
        origin = wide(base[j])
        x = np.float64(np.float32(wide(one[j]) - origin))
        y = np.float64(np.float32(wide(two[j]) - origin))
        z = np.float64(np.float32(wide(three[j]) - origin))
        sums[j] += x * x
        sums[PADDED + j] += x * y
        sums[2 * PADDED + j] += x * z
        sums[3 * PADDED + j] += y * y
        sums[4 * PADDED + j] += y * z
        sums[5 * PADDED + j] += z * z


@compiled
def _products_of_three(matrix: Any, first: Any, last: Any, lanes: Any) -> None:
    """Do as `products` where there are three models, of which there are most often."""
    # Float64 from the start of a cache line on, or vectors would span two.
    sums = rows_of(12).reshape(-1).view(np.float64)
    sums[:] = 0.0
    for start in range(first, last, STRETCH):
        end = min(start + STRETCH, last)
        base, one, two = matrix[0, start:end], matrix[1, start:end], matrix[2, start:end]
        _add_of_three(base, one, two, matrix[3, start:end], sums)
    pair = 0
    for i in range(3):
        for k in range(i, 3):
            for j in range(STRETCH):
                lanes[i, k, j] += sums[pair * PADDED + j]
            pair += 1


@compiled
def products(matrix: Any, first: Any, last: Any, lanes: Any) -> None:
    """Put products of the differences from the first row into `lanes`.

    Args:
        matrix: base and models.
        first: element to begin with.
        last: element to end before.
        lanes: float64 [models, models, a divisor of STRETCH], zeros: of each pair, the lower number
            first, Σ of the products of elements whose numbers leave the same remainder, in their
            order.
    """
    models, count = matrix.shape[0] - 1, lanes.shape[2]
    if models == 3 and count == STRETCH:
        _products_of_three(matrix, first, last, lanes)
        return
    room, rows = np.empty((2, STRETCH), np.float32), np.empty((models, STRETCH), np.float64)
    for start in range(first, last, STRETCH):
        end = min(start + STRETCH, last)
        size = end - start
        widen(matrix[0, start:end], room[0, :size])
        for i in range(models):
            row = matrix[i + 1, start:end]
            _difference(row, room[0, :size], room[1, :size], rows[i, :size])
        for i in range(models):
            for k in range(i, models):
                for at in range(0, size, count):
                    part = slice(at, min(at + count, size))
                    _add_products(lanes[i, k], rows[i, part], rows[k, part])


@compiled
def _step(base: Any, total: Any, factor: Any, out: Any) -> None:
    # Zeros are added because a sum of negative zeros is to be a positive one.
    for j in range(base.size):
        store(out, j, base[j] + (total[j] + ZERO) * factor)


@compiled
def towards(matrix: Any, factor: Any, out: Any) -> None:
    """Put the base plus `factor` times the sum of the differences from it into `out`.

    Args:
        matrix: base and models.
        factor: float32.
        out: float32 [elements]; or uint16, for bits of bfloat16.
    """
    room = np.empty((3, STRETCH), np.float32)
    for start in range(0, matrix.shape[1], STRETCH):
        end = min(start + STRETCH, matrix.shape[1])
        size = end - start
        base, row, total = room[0, :size], room[1, :size], room[2, :size]
        widen(matrix[0, start:end], base)
        widen(matrix[1, start:end], total)
        subtract(total, base)
        for i in range(2, matrix.shape[0]):
            widen(matrix[i, start:end], row)
            subtract(row, base)
            add(total, row)
        _step(base, total, factor, out[start:end])


def warm(kind: Any) -> None:
    """Have everything compiled for matrices of numpy dtype `kind`."""
    matrix: Any = np.zeros((2, 2), kind)
    products(matrix, 0, 2, np.zeros((1, 1, 2)))
    for out in (np.zeros(2, np.float32), np.zeros(2, np.uint16)):
        towards(matrix, ZERO, out)

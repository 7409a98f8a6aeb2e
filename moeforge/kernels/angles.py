"""Owns the sums that the angle between two tensors follows from."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeforge.kernels.lanes import fold
from moeforge.kernels.rows import PADDED, STRETCH, ZERO, compiled, rows_of, wide


@compiled
def _add_squares(one: Any, other: Any, sums: Any) -> None:
    # In one array, a known distance apart: compiled for vectors without asking where they lie.
    for j in range(one.size):
        a, b = wide(one[j]), wide(other[j])
        sums[j] += a * a
        sums[PADDED + j] += b * b
        sums[2 * PADDED + j] += a * b


@compiled
def _add_four(one: Any, other: Any, sums: Any) -> None:
    """Do as `_add_squares` with four stretches in their order, for a quarter of the stores."""
    for j in range(STRETCH):
        x, y, z = sums[j], sums[PADDED + j], sums[2 * PADDED + j]
        for k in range(4):
            a, b = wide(one[k * STRETCH + j]), wide(other[k * STRETCH + j])
            x += a * a
            y += b * b
            z += a * b
        sums[j], sums[PADDED + j], sums[2 * PADDED + j] = x, y, z


@compiled
def squares(matrix: Any, block: Any, sums: Any) -> None:
    """Put Σa², Σb² and Σab of each block of the two rows of `matrix` into `sums`.

    Args:
        matrix: two inputs.
        block: elements per block.
        sums: float64 [blocks, 3].
    """
    lanes = rows_of(3)
    lanes[:] = ZERO
    for number in range(sums.shape[0]):
        last = min((number + 1) * block, matrix.shape[1])
        start, sums_of = number * block, lanes.reshape(-1)
        while start + 4 * STRETCH <= last:
            end = start + 4 * STRETCH
            _add_four(matrix[0, start:end], matrix[1, start:end], sums_of)
            start = end
        while start < last:
            end = min(start + STRETCH, last)
            _add_squares(matrix[0, start:end], matrix[1, start:end], sums_of)
            start = end
        fold(lanes, sums[number])


def warm(kind: Any) -> None:
    """Have everything compiled for matrices of numpy dtype `kind`."""
    squares(np.zeros((2, 2), kind), 2, np.zeros((1, 3)))

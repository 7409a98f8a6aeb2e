"""Owns the sums that the angle between two tensors follows from."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeforge.kernels.lanes import fold
from moeforge.kernels.rows import PADDED, STRETCH, compiled, wide


@compiled
def _add_squares(one: Any, other: Any, sums: Any) -> None:
    # In one array, a known distance apart: compiled for vectors without asking where they lie.
    for j in range(one.size):
        a, b = wide(one[j]), wide(other[j])
        sums[j] += a * a
        sums[PADDED + j] += b * b
        sums[2 * PADDED + j] += a * b


@compiled
def squares(matrix: Any, block: Any, sums: Any) -> None:
    """Put Σa², Σb² and Σab of each block of the two rows of `matrix` into `sums`.

    Args:
        matrix: two inputs.
        block: elements per block.
        sums: float64 [blocks, 3].
    """
    lanes = np.zeros((3, PADDED), np.float32)
    for number in range(sums.shape[0]):
        last = min((number + 1) * block, matrix.shape[1])
        for start in range(number * block, last, STRETCH):
            end = min(start + STRETCH, last)
            _add_squares(matrix[0, start:end], matrix[1, start:end], lanes.reshape(-1))
        fold(lanes, sums[number])


def warm(kind: Any) -> None:
    """Have everything compiled for matrices of numpy dtype `kind`."""
    squares(np.zeros((2, 2), kind), 2, np.zeros((1, 3)))

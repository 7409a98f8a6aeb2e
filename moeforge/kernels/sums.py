"""Owns weighted sums."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeforge.kernels.rows import STRETCH, compiled, widen


@compiled
def _add_weighted(total: Any, row: Any, weight: Any) -> None:
    for j in range(row.size):
        total[j] += row[j] * weight


@compiled
def weighted(matrix: Any, weights: Any, out: Any) -> None:
    """Put Σ wᵢ·xᵢ into `out` [elements], added up in order; weights float32 [inputs]."""
    room = np.empty(STRETCH, np.float32)
    for start in range(0, matrix.shape[1], STRETCH):
        end = min(start + STRETCH, matrix.shape[1])
        row, total = room[: end - start], out[start:end]
        widen(matrix[0, start:end], total)
        for j in range(total.size):
            total[j] = total[j] * weights[0]
        for i in range(1, matrix.shape[0]):
            widen(matrix[i, start:end], row)
            _add_weighted(total, row, weights[i])


def warm(kind: Any) -> None:
    """Have everything compiled for matrices of numpy dtype `kind`."""
    weighted(np.zeros((2, 2), kind), np.ones(2, np.float32), np.zeros(2, np.float32))

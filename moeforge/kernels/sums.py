"""Owns weighted sums."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeforge.kernels.rows import STRETCH, compiled, store, wide


@compiled
def _begin(row: Any, weight: Any, total: Any) -> None:
    for j in range(total.size):
        total[j] = wide(row[j]) * weight


@compiled
def _add(row: Any, weight: Any, total: Any) -> None:
    for j in range(total.size):
        total[j] += wide(row[j]) * weight


@compiled
def _finish(row: Any, weight: Any, total: Any, out: Any) -> None:
    for j in range(total.size):
        store(out, j, total[j] + wide(row[j]) * weight)


@compiled
def _of_one(row: Any, weight: Any, out: Any) -> None:
    for j in range(row.size):
        store(out, j, wide(row[j]) * weight)


@compiled
def weighted(matrix: Any, weights: Any, out: Any) -> None:
    """Put Σ wᵢ·xᵢ into `out` [elements], added up in order.

    Args:
        matrix: inputs.
        weights: float32 [inputs].
        out: float32; or uint16, for bits of bfloat16.
    """
    room, last = np.empty(STRETCH, np.float32), matrix.shape[0] - 1
    if last == 0:
        _of_one(matrix[0], weights[0], out)
        return
    for start in range(0, matrix.shape[1], STRETCH):
        end = min(start + STRETCH, matrix.shape[1])
        total = room[: end - start]
        _begin(matrix[0, start:end], weights[0], total)
        for i in range(1, last):
            _add(matrix[i, start:end], weights[i], total)
        _finish(matrix[last, start:end], weights[last], total, out[start:end])


def warm(kind: Any) -> None:
    """Have everything compiled for matrices of numpy dtype `kind`."""
    for result in (np.uint16, np.float32):
        weighted(np.zeros((2, 2), kind), np.ones(2, np.float32), np.zeros(2, result))

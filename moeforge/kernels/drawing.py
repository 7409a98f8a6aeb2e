"""Owns random draws, and keeping what they choose."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeforge.kernels.rows import STRETCH, compiled

_GOLDEN, _FIRST, _SECOND = (
    np.uint64(0x9E3779B97F4A7C15),
    np.uint64(0xBF58476D1CE4E5B9),
    np.uint64(0x94D049BB133111EB),
)


@compiled
def draws(key: Any, start: Any, out: Any) -> None:
    """Put the draws of elements from `start` on into `out` [elements], int16, as `_random.draws`.

    Args:
        key: uint64.
        start: number of the first element.
        out: int16.
    """
    words = np.empty(STRETCH // 4, np.uint64)
    lanes = words.view(np.int16)
    done = 0
    while done < out.size:
        first = (start + done) // 4
        for j in range(words.size):
            word = np.uint64(first + j) * _GOLDEN + (key + _GOLDEN)
            word = (word ^ (word >> np.uint64(30))) * _FIRST
            word = (word ^ (word >> np.uint64(27))) * _SECOND
            words[j] = word ^ (word >> np.uint64(31))
        begin = start + done - 4 * first
        count = min(STRETCH - begin, out.size - done)
        out[done : done + count] = lanes[begin : begin + count]
        done += count


@compiled
def keep(values: Any, kept: Any) -> None:
    """Multiply float32 `values` in place with `kept`, uint8, zeros and ones."""
    for j in range(values.size):
        values[j] *= np.float32(kept[j])


def warm(kind: Any) -> None:
    """Have everything compiled; draws know no dtype."""
    draws(np.uint64(0), 0, np.zeros(2, np.int16))
    keep(np.zeros(2, np.float32), np.zeros(2, np.uint8))

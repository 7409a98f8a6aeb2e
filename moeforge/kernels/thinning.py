"""Owns thinning by rank as a whole: what is kept of differences, and what they sum up to.

A row at a time, which fits the caches: its magnitudes, its draws, its choices.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeforge.kernels import ranking
from moeforge.kernels.bits import pack
from moeforge.kernels.drawing import words_of
from moeforge.kernels.lanes import fold
from moeforge.kernels.rows import STRETCH, as_bits, compiled, wide


@compiled
def _magnitudes(row: Any, base: Any, out: Any, sums: Any) -> Any:
    """Put magnitudes of differences into `out`, add them to `sums`; return the largest's bits."""
    high = np.uint32(0)
    for j in range(row.size):
        value = abs(wide(row[j]) - wide(base[j]))
        out[j] = value
        sums[j] += value
        high = max(high, as_bits(value))
    return high


@compiled
def _add_kept(values: Any, kept: Any, sums: Any) -> None:
    for j in range(values.size):
        sums[j] += values[j] * np.float32(kept[j])


@compiled
def thinned(
    matrix: Any, row: Any, start: Any, keys: Any, bounds: Any, whole: Any, sums: Any, out: Any
) -> None:
    """Find what is kept of each model's differences from the base.

    Args:
        matrix: base and models; whole rows, at most a block.
        row: elements of a row, fewer than 2¹⁶.
        start: number of the first element.
        keys: uint64 [models], which draws follow from.
        bounds: uint16 [models, row], what draws are below if they keep the element of a rank.
        whole: bool [models], whether everything is kept instead.
        sums: float64 [2, models], for Σ|δ| of everything, and of what is kept.
        out: uint8 [models, elements / 8, rounded up], for what is kept, as bits.
    """
    values, words = np.empty(row, np.float32), np.empty(row // 4 + 2, np.uint64)
    drawn = words.view(np.int16)
    kept, room = np.zeros(8 * out.shape[1], np.uint8), ranking.rooms(row)
    lanes = np.zeros((2, STRETCH), np.float32)
    for i in range(keys.size):
        for first in range(0, matrix.shape[1], row):
            end, high = first + row, np.uint32(0)
            begin = first
            while begin < end:
                lane = begin % STRETCH
                to = min(begin - lane + STRETCH, end)
                inputs = (matrix[i + 1, begin:to], matrix[0, begin:to])
                into = (values[begin - first : to - first], lanes[0, lane:])
                high = max(high, _magnitudes(*inputs, *into))
                begin = to
            if whole[i]:
                kept[first:end] = 1
            else:
                word = (start + first) // 4
                words_of(keys[i], word, words)
                odd = start + first - 4 * word
                bits, here = values.view(np.uint32), drawn[odd : odd + row]
                ranking.choose_row(bits, high, here, bounds[i], kept[first:end], room)
            begin = first
            while begin < end:
                lane = begin % STRETCH
                to = min(begin - lane + STRETCH, end)
                _add_kept(values[begin - first : to - first], kept[begin:to], lanes[1, lane:])
                begin = to
        fold(lanes, sums[:, i])
        pack(kept, out[i])


def warm(kind: Any) -> None:
    """Have everything compiled for matrices of numpy dtype `kind`."""
    ranking.warm(kind)
    matrix: Any = np.zeros((2, 2), kind)
    keys, bounds = np.zeros(1, np.uint64), np.zeros((1, 2), np.uint16)
    sums, out = np.zeros((2, 1)), np.zeros((1, 1), np.uint8)
    thinned(matrix, 2, 0, keys, bounds, np.zeros(1, np.bool_), sums, out)

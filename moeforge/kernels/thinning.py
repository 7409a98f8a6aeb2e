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
from moeforge.kernels.rows import (
    PADDED,
    STRETCH,
    ZERO,
    as_bits,
    borrowed,
    compiled,
    rows_of,
    wide,
)


@compiled
def _magnitudes(row: Any, base: Any, out: Any) -> Any:
    """Put magnitudes of differences into `out`, and return the bits of the largest."""
    row, base, out, high = borrowed(row), borrowed(base), borrowed(out), np.uint32(0)
    for j in range(out.size):
        value = abs(wide(row[j]) - wide(base[j]))
        out[j] = value
        high = max(high, as_bits(value))
    return high


@compiled
def _add_stretch(values: Any, kept: Any, sums: Any) -> None:
    # In one array, a known distance apart: compiled for vectors without asking where they lie.
    for j in range(values.size):
        sums[j] += values[j]
        sums[PADDED + j] += values[j] * np.float32(kept[j])


@compiled
def _add(values: Any, kept: Any, number: Any, lanes: Any) -> None:
    """Add `values`, and those that are kept, to their lanes; `number` is the first one's."""
    values, kept, sums, begin = borrowed(values), borrowed(kept), borrowed(lanes).reshape(-1), 0
    while begin < values.size:
        lane = (number + begin) % STRETCH
        end = min(begin + STRETCH - lane, values.size)
        _add_stretch(values[begin:end], kept[begin:end], sums[lane:])
        begin = end


@compiled
def thinned(
    matrix: Any,
    row: Any,
    group: Any,
    start: Any,
    keys: Any,
    bounds: Any,
    whole: Any,
    sums: Any,
    out: Any,
) -> None:
    """Find what is kept of each model's differences from the base.

    Args:
        matrix: base and models; whole rows.
        row: elements of a row, fewer than 2¹⁶.
        group: elements of the rows that are added up together.
        start: number of the first element.
        keys: uint64 [models], which draws follow from.
        bounds: uint16 [models, 2·row − 1], what draws are below if they keep: see `choose_row`.
        whole: bool [models], whether everything is kept instead.
        sums: float64 [groups, 2, models], for Σ|δ| of everything, and of what is kept.
        out: uint8 [models, elements / 8, rounded up], for what is kept, as bits.
    """
    values, words = np.empty(row, np.float32), np.empty(row // 4 + 2, np.uint64)
    drawn = words.view(np.int16)
    # Packed eight rows at a time, which are whole bytes: memory for all choices would be large
    # enough for malloc to give it back each time.
    kept, room = np.zeros(8 * row, np.uint8), ranking.rooms(row)
    lanes = rows_of(2)
    lanes[:] = ZERO
    for i in range(keys.size):
        for first in range(0, matrix.shape[1], row):
            here, before = slice(first, first + row), first % kept.size
            inputs, choices = (matrix[i + 1, here], matrix[0, here]), kept[before : before + row]
            number = first % group
            high = _magnitudes(*inputs, values)
            if whole[i]:
                choices[:] = 1
            else:
                word = (start + first) // 4
                words_of(keys[i], word, words)
                odd = start + first - 4 * word
                given = (values.view(np.uint32), high, drawn[odd : odd + row], bounds[i])
                ranking.choose_row(*given, choices, room)
            _add(values, choices, number, lanes)
            done = before + row
            if done == kept.size or first + row == matrix.shape[1]:
                kept[done:] = 0
                pack(kept, out[i, (first - before) // 8 : (first + row + 7) // 8])
            if number + row == group or first + row == matrix.shape[1]:
                fold(lanes, sums[first // group, :, i])


def warm(kind: Any) -> None:
    """Have everything compiled for matrices of numpy dtype `kind`."""
    ranking.warm(kind)
    matrix: Any = np.zeros((2, 2), kind)
    keys, bounds = np.zeros(1, np.uint64), np.zeros((1, 3), np.uint16)
    sums, out = np.zeros((1, 2, 1)), np.zeros((1, 1), np.uint8)
    thinned(matrix, 2, 2, 0, keys, bounds, np.zeros(1, np.bool_), sums, out)

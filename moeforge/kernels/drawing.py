"""Owns random draws, and what they choose among the differences from a base."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeforge.kernels.lanes import fold
from moeforge.kernels.rows import (
    ONE,
    PADDED,
    STRETCH,
    ZERO,
    borrowed,
    compiled,
    rows_of,
    wide,
)

_GOLDEN, _FIRST, _SECOND = (
    np.uint64(0x9E3779B97F4A7C15),
    np.uint64(0xBF58476D1CE4E5B9),
    np.uint64(0x94D049BB133111EB),
)
ALL = 2**15
"""Where draws below a limit are kept: the limit that keeps everything."""


@compiled
def words_of(key: Any, first: Any, words: Any) -> None:
    """Put the words of numbers from `first` on into `words`, uint64: four draws each."""
    state = np.uint64(first) * _GOLDEN + (key + _GOLDEN)
    for j in range(words.size):
        word = (state ^ (state >> np.uint64(30))) * _FIRST
        word = (word ^ (word >> np.uint64(27))) * _SECOND
        words[j] = word ^ (word >> np.uint64(31))
        state += _GOLDEN


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
        words_of(key, first, words)
        begin = start + done - 4 * first
        count = min(STRETCH - begin, out.size - done)
        out[done : done + count] = lanes[begin : begin + count]
        done += count


@compiled
def keep(values: Any, kept: Any) -> None:
    """Multiply float32 `values` in place with `kept`, uint8, zeros and ones."""
    for j in range(values.size):
        values[j] *= np.float32(kept[j])


@compiled
def _add_magnitudes(row: Any, base: Any, sums: Any) -> None:
    for j in range(row.size):
        sums[j] += abs(wide(row[j]) - wide(base[j]))


@compiled
def _add_drawn(row: Any, base: Any, drawn: Any, limit: Any, sums: Any) -> None:
    # In one array, a known distance apart: compiled for vectors without asking where they lie.
    for j in range(row.size):
        value = abs(wide(row[j]) - wide(base[j]))
        sums[j] += value
        sums[PADDED + j] += value * (ONE if drawn[j] < limit else ZERO)


@compiled
def _add_four_drawn(row: Any, base: Any, drawn: Any, limit: Any, sums: Any) -> None:
    """Do as `_add_drawn` with four stretches in their order, for a quarter of the stores."""
    for j in range(STRETCH):
        every, some = sums[j], sums[PADDED + j]
        for k in range(4):
            value = abs(wide(row[k * STRETCH + j]) - wide(base[k * STRETCH + j]))
            every += value
            some += value * (ONE if drawn[k * STRETCH + j] < limit else ZERO)
        sums[j], sums[PADDED + j] = every, some


@compiled
def _thinned(
    matrix: Any, start: Any, keys: Any, limits: Any, block: Any, room: Any, words: Any, sums: Any
) -> None:
    matrix, room, words, sums = borrowed(matrix), borrowed(room), borrowed(words), borrowed(sums)
    models, draws = matrix.shape[0] - 1, words.view(np.int16)
    lanes = room.reshape(models, 2, PADDED)
    lanes[:] = ZERO
    for number in range(sums.shape[0]):
        begin, last = number * block, min((number + 1) * block, matrix.shape[1])
        while begin < last:
            four = begin + 4 * STRETCH <= last
            end = begin + 4 * STRETCH if four else min(begin + STRETCH, last)
            first, base = (start + begin) // 4, matrix[0, begin:end]
            drawn = draws[start + begin - 4 * first :][: end - begin]
            for i in range(models):
                row, into = matrix[i + 1, begin:end], lanes[i].reshape(-1)
                if limits[i] >= ALL:
                    for at in range(0, row.size, STRETCH):
                        _add_magnitudes(row[at : at + STRETCH], base[at : at + STRETCH], into)
                    continue
                words_of(keys[i], first, words[: (row.size + 6) // 4])
                if four:
                    _add_four_drawn(row, base, drawn, limits[i], into)
                else:
                    _add_drawn(row, base, drawn, limits[i], into)
            begin = end
        for i in range(models):
            if limits[i] >= ALL:
                lanes[i, 1] = lanes[i, 0]
            fold(lanes[i], sums[number, :, i])


def thinned(matrix: Any, start: Any, keys: Any, limits: Any, block: Any, sums: Any) -> None:
    """Put Σ|δ| of each model's differences from the base, and of what is drawn, into `sums`.

    Args:
        matrix: base and models.
        start: number of the first element.
        keys: uint64 [models], which draws follow from.
        limits: int32 [models], below which draws are kept; ALL for everything.
        block: elements per block.
        sums: float64 [blocks, 2, models]; as it is for everything, and for what is kept.
    """
    words, room = np.empty(STRETCH + 1, np.uint64), rows_of(2 * (matrix.shape[0] - 1))
    _thinned(matrix, start, keys, limits, block, room, words, sums)


def warm(kind: Any) -> None:
    """Have everything compiled for matrices of numpy dtype `kind`."""
    draws(np.uint64(0), 0, np.zeros(2, np.int16))
    keep(np.zeros(2, np.float32), np.zeros(2, np.uint8))
    keys, limits = np.zeros(1, np.uint64), np.zeros(1, np.int32)
    thinned(np.zeros((2, 2), kind), 0, keys, limits, 2, np.zeros((1, 2, 1)))

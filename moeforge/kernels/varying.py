"""Owns what `sce` needs: how far models are from one another, their energies, and its merge."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeforge.kernels import counting
from moeforge.kernels.counting import ROOM, collect
from moeforge.kernels.lanes import fold
from moeforge.kernels.rows import (
    ONE,
    STRETCH,
    ZERO,
    as_bits,
    borrowed,
    compiled,
    rows_of,
    sign_of,
    store,
    wide,
    widen,
)

_NOWHERE = np.uint32(0xFFFFFFFF)


@compiled
def _add_square(one: Any, two: Any, spread: Any) -> None:
    for j in range(spread.size):
        x = wide(one[j]) - wide(two[j])
        spread[j] += x * x


@compiled
def _spread_of_three(one: Any, two: Any, three: Any, spread: Any) -> None:
    """Do as `_spread`, in one loop, for as many models as are merged most often."""
    for j in range(spread.size):
        a, b, c = wide(one[j]), wide(two[j]), wide(three[j])
        x, y, z = a - b, a - c, b - c
        spread[j] = x * x + y * y + z * z


@compiled
def _spread(matrix: Any, start: Any, end: Any, spread: Any) -> None:
    """Put Σ (xᵢ − xₖ)² over every two models into `spread`."""
    if matrix.shape[0] == 4:
        one, two, three = matrix[1, start:end], matrix[2, start:end], matrix[3, start:end]
        _spread_of_three(one, two, three, spread)
        return
    spread[:] = ZERO
    for i in range(1, matrix.shape[0]):
        for k in range(i + 1, matrix.shape[0]):
            _add_square(matrix[i, start:end], matrix[k, start:end], spread)


@compiled
def spreads(matrix: Any, out: Any) -> None:
    """Put the sum of squared differences between every two models into `out` [elements]."""
    for start in range(0, matrix.shape[1], STRETCH):
        end = min(start + STRETCH, matrix.shape[1])
        _spread(matrix, start, end, out[start:end])


@compiled
def _parts(start: Any, end: Any, border: Any, bounds: Any) -> Any:
    """Return start, end and bound of what lies before `border`, and of what lies from it on."""
    middle = min(max(border, start), end)
    return (start, middle, bounds[0]), (middle, end, bounds[1])


@compiled
def _add_energy(row: Any, base: Any, spread: Any, bound: Any, lanes: Any) -> None:
    for j in range(row.size):
        x = wide(row[j]) - wide(base[j])
        lanes[j] += x * x if spread[j] >= bound else ZERO


@compiled
def energies(matrix: Any, bounds: Any, border: Any, block: Any, sums: Any) -> None:
    """Put the energies of those differences from the first row that are selected into `sums`.

    Args:
        matrix: base and models.
        bounds: float32 [2]: elements of at least this spread are selected, before `border` and
            from it on; all of them, if it is negative; none, if it is NaN.
        border: an element's number.
        block: elements in a block, a multiple of STRETCH.
        sums: float64 [blocks, models].
    """
    matrix, room, lanes = borrowed(matrix), rows_of(1)[0], rows_of(sums.shape[1])
    room[:], lanes[:] = ZERO, ZERO
    for number in range(sums.shape[0]):
        last = min((number + 1) * block, matrix.shape[1])
        for start in range(number * block, last, STRETCH):
            for first, stop, bound in _parts(start, min(start + STRETCH, last), border, bounds):
                if first == stop:
                    continue
                spread = room[: stop - first]
                if bound >= ZERO:
                    _spread(matrix, first, stop, spread)
                for i in range(1, matrix.shape[0]):
                    here = lanes[i - 1, first - start : stop - start]
                    _add_energy(matrix[i, first:stop], matrix[0, first:stop], spread, bound, here)
        fold(lanes, sums[number])


@compiled
def _count(spread: Any, stop: Any) -> Any:
    reached, varying = np.int32(0), np.int32(0)
    for j in range(spread.size):
        reached += np.int32(spread[j] >= stop)
        varying += np.int32(spread[j] != ZERO)
    return reached, varying


@compiled
def _number(spread: Any, first: Any, width: Any, numbers: Any) -> None:
    """Put the numbers of the elements inside a bracket into `numbers`, of others _NOWHERE."""
    for j in range(spread.size):
        inside = np.uint32(as_bits(spread[j]) - first) < width
        numbers[j] = np.uint32(j) if inside else _NOWHERE


@compiled
def _add_squares(row: Any, base: Any, spread: Any, bound: Any, squares: Any, lanes: Any) -> None:
    """Do as `_add_energy`; put the squares of all differences into `squares`."""
    for j in range(row.size):
        x = wide(row[j]) - wide(base[j])
        x = x * x
        squares[j] = x
        lanes[j] += x if spread[j] >= bound else ZERO


@compiled
def _take(values: Any, numbers: Any, out: Any) -> None:
    for k in range(out.size):
        out[k] = values[numbers[k]]


@compiled
def tally(
    matrix: Any, first: Any, stop: Any, block: Any, most: Any, sums: Any, values: Any, squares: Any
) -> Any:
    """Count spreads around a bracket, and collect those inside and what would be their energy.

    Args:
        matrix: base and models.
        first: float32, spread from which on elements are inside.
        stop: float32, spread from which on they are above the bracket.
        block: elements in a block, a multiple of STRETCH.
        most: float64, share of a block up to which it is not crowded.
        sums: float64 [blocks, models], for the energies of the differences from the first row of
            elements above the bracket.
        values: float32 [elements], for the spreads inside.
        squares: float32 [models, elements], for the squares of the differences there.

    Returns:
        How many are above, how many vary at all, how many are inside; and whether a block is
        crowded with these.
    """
    matrix, room, lanes = borrowed(matrix), rows_of(2), rows_of(sums.shape[1])
    values, squares = borrowed(values), borrowed(squares)
    lanes[:] = ZERO
    numbers, found = np.empty(STRETCH, np.uint32), np.empty(STRETCH + ROOM, np.uint32)
    above, varying, inside, crowded = 0, 0, 0, False
    low = as_bits(first)
    width = np.uint32(as_bits(stop) - low)
    for number in range(sums.shape[0]):
        last, before = min((number + 1) * block, matrix.shape[1]), inside
        for start in range(number * block, last, STRETCH):
            end = min(start + STRETCH, last)
            size = end - start
            spread, row, base = room[0, :size], room[1, :size], matrix[0, start:end]
            _spread(matrix, start, end, spread)
            reached, vary = _count(spread, stop)
            above += reached
            varying += vary
            _number(spread, low, width, numbers[:size])
            count = collect(numbers[:size], np.uint32(0), np.uint32(STRETCH), found, np.uint64(0))
            until = inside + np.int64(count)
            if reached or count:
                _take(spread, found, values[inside:until])
                for i in range(sums.shape[1]):
                    here = lanes[i, :size]
                    _add_squares(matrix[i + 1, start:end], base, spread, stop, row, here)
                    _take(row, found, squares[i, inside:until])
            inside = until
        crowded |= inside - before > most * (last - number * block)
        fold(lanes, sums[number])
    return above, varying, inside, crowded


@compiled
def _add_difference(row: Any, base: Any, total: Any) -> None:
    for j in range(row.size):
        total[j] += wide(row[j]) - base[j]


@compiled
def _elect(total: Any, spread: Any, bound: Any, sign: Any, divisor: Any) -> None:
    """Put the signs of sums into `sign`, zero where nothing is selected; begin sums anew."""
    for j in range(total.size):
        sign[j] = sign_of(total[j]) if spread[j] >= bound else ZERO
        total[j], divisor[j] = ZERO, ZERO


@compiled
def _add_terms(row: Any, base: Any, sign: Any, weight: Any, total: Any, divisor: Any) -> None:
    for j in range(row.size):
        x = (wide(row[j]) - base[j]) * sign[j]
        x = ZERO if x < ZERO else x
        total[j] += x * weight
        divisor[j] += weight if x > ZERO else ZERO


@compiled
def _add_quotient(base: Any, total: Any, sign: Any, divisor: Any, least: Any, out: Any) -> None:
    for j in range(base.size):
        store(out, j, base[j] + total[j] * (sign[j] / max(divisor[j], least)))


@compiled
def _merge(
    matrix: Any, start: Any, end: Any, bound: Any, weights: Any, least: Any, room: Any, out: Any
) -> None:
    size = end - start
    base, spread, total = room[0, :size], room[1, :size], room[2, :size]
    sign, divisor = room[3, :size], room[4, :size]
    widen(matrix[0, start:end], base)
    _spread(matrix, start, end, spread)
    total[:] = ZERO
    for i in range(1, matrix.shape[0]):
        _add_difference(matrix[i, start:end], base, total)
    # Of what is not selected nothing has the sign zero, and the result is the base.
    _elect(total, spread, bound, sign, divisor)
    for i in range(1, matrix.shape[0]):
        _add_terms(matrix[i, start:end], base, sign, weights[i - 1], total, divisor)
    _add_quotient(base, total, sign, divisor, least, out)


@compiled
def _positive(value: Any) -> Any:
    return ZERO if value < ZERO else value


@compiled
def _merge_three(
    base: Any, one: Any, two: Any, three: Any, bound: Any, weights: Any, least: Any, out: Any
) -> None:
    """Do as `_merge`, in one loop, for as many models as are merged most often."""
    u, v, w = weights[0], weights[1], weights[2]
    for j in range(out.size):
        origin, a, b, c = wide(base[j]), wide(one[j]), wide(two[j]), wide(three[j])
        x, y, z = a - b, a - c, b - c
        spread = x * x + y * y + z * z
        a, b, c = a - origin, b - origin, c - origin
        sign = sign_of(a + b + c) if spread >= bound else ZERO
        a, b, c = _positive(a * sign), _positive(b * sign), _positive(c * sign)
        total = ZERO + a * u + b * v + c * w
        divisor = u if a > ZERO else ZERO
        divisor += v if b > ZERO else ZERO
        divisor += w if c > ZERO else ZERO
        store(out, j, origin + total * (sign / max(divisor, least)))


@compiled
def sce(matrix: Any, bounds: Any, border: Any, weights: Any, least: Any, out: Any) -> None:
    """Put base + Σ wᵢ·δᵢ / Σ wᵢ into `out`, over the models whose sign is that of Σ δ.

    Args:
        matrix: base and models.
        bounds: as in `energies`.
        border: as in `energies`.
        weights: float32 [models].
        least: float32, what Σ wᵢ is at least.
        out: float32 [elements]; or uint16, for bits of bfloat16.
    """
    matrix, out, room = borrowed(matrix), borrowed(out), rows_of(5)
    for start in range(0, matrix.shape[1], STRETCH):
        for first, stop, bound in _parts(
            start, min(start + STRETCH, matrix.shape[1]), border, bounds
        ):
            if first == stop:
                continue
            if matrix.shape[0] == 4:
                base, one = matrix[0, first:stop], matrix[1, first:stop]
                two, three = matrix[2, first:stop], matrix[3, first:stop]
                _merge_three(base, one, two, three, bound, weights, least, out[first:stop])
            else:
                _merge(matrix, first, stop, bound, weights, least, room, out[first:stop])


def warm(kind: Any) -> None:
    """Have everything compiled for matrices of numpy dtype `kind`."""
    matrix: Any = np.zeros((2, 2), kind)
    sums, out = np.zeros((1, 1)), np.zeros((1, 2), np.float32)
    bounds, one = np.zeros(2, np.float32), np.ones(1, np.float32)
    counting.warm(kind)
    spreads(matrix, out[0])
    energies(matrix, bounds, 0, 2 * STRETCH, sums)
    tally(matrix, ONE, ONE, 2 * STRETCH, 1.0, sums, out[0], out)
    for result in (out[0], np.zeros(2, np.uint16)):
        sce(matrix, bounds, 0, one, ONE, result)

"""Owns ranks within rows: which elements are kept for being large enough among those of their row.

No row is sorted. Magnitudes are counted by their upper bits, and each remembers how many of its bin
came before it in its half of the row. Differences of bfloat16 numbers mostly have no lower bits:
those of a bin are equal then, equal ones rank by position, and what was remembered is the rank.
Elements with lower bits, the fine ones, are listed; where they leave a rank open that decides, it
is found among them. Only of a row in which that takes long all ranks are worked out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeforge.kernels.counting import equal
from moeforge.kernels.listing import LANES, marked, sift
from moeforge.kernels.rows import borrowed, compiled

_BINS, _SHIFT, _UPPER = 2**11, np.uint32(16), np.uint32(0xFFFF0000)
"""Magnitudes are told apart by 7 bits of their fraction, in 16 powers of two below the largest."""
_ACROSS, _DOWN, _LAST = np.uint16(5), np.uint16(6), np.uint16(2**6 - 1)
"""Bins lie in 32 columns of 64, so that those before them are summed up 32 at a time."""
_HALF = np.int16(-(2**15))
_CROWD = 4
"""Where more than such a part of a row is fine, it does not pay to tell the others from them."""
_OFTEN = 2**7
"""Fine elements looked at, for each one of the row, from which on sorting it takes less."""
_DIGIT, _DIGITS = np.uint32(11), 3
_NONE, _ONE = np.uint16(0), np.uint16(1)


@compiled
def rooms(row: Any) -> Any:
    """Return the memory that `choose_row` needs for rows of so many elements."""
    return (
        np.empty((2, row), np.uint16),
        np.empty((2, _BINS), np.uint16),
        np.empty((3, _BINS), np.uint16),
        np.empty((2, LANES), np.uint16),
        np.empty((3, row + LANES), np.uint16),
        np.empty(row, np.uint32),
    )


@compiled
def _plain(bits: Any, least: Any) -> Any:
    """Return the smallest magnitude of the bin of `bits`; other magnitudes of it are fine."""
    return np.uint32(0) if bits >> _SHIFT <= least else np.uint32(bits & _UPPER)


@compiled
def _place(bits: Any, least: Any, bins: Any, fine: Any) -> None:
    """Put the bins of elements into `bins`, and whether they are fine into `fine`, one or zero."""
    for j in range(bits.size):
        key = np.uint16(bits[j] >> _SHIFT)
        bin_ = np.uint16(max(key, least) - least)
        bins[j] = np.uint16(np.uint16(bin_ & _LAST) << _ACROSS) | np.uint16(bin_ >> _DOWN)
        fine[j] = np.uint16(bits[j] != _plain(bits[j], least))


@compiled
def _half(row: Any) -> Any:
    return row.size // (2 * LANES) * LANES


@compiled
def _count(bins: Any, tables: Any, before: Any) -> None:
    """Put how many of each bin are in either half into `tables`, and are before each in its own."""
    half = _half(bins)
    one, other, first, second = bins[:half], bins[half:], before[:half], before[half:]
    ones, others = tables[0], tables[1]
    tables[:] = 0
    # Side by side, for of equal values one count waits for the other.
    for j in range(half):
        first[j] = ones[one[j]]
        ones[one[j]] = np.uint16(first[j] + _ONE)
        second[j] = others[other[j]]
        others[other[j]] = np.uint16(second[j] + _ONE)
    for j in range(half, other.size):
        second[j] = others[other[j]]
        others[other[j]] = np.uint16(second[j] + _ONE)


@compiled
def _sum_halves(ones: Any, others: Any, total: Any) -> None:
    for k in range(total.size):
        total[k] = np.uint16(ones[k] + others[k])
        ones[k], others[k] = _NONE, ones[k]


@compiled
def _sum_columns(total: Any, below: Any) -> None:
    for k in range(total.size - LANES):
        below[k + LANES] = np.uint16(below[k] + total[k])


@compiled
def _copy(numbers: Any, out: Any) -> None:
    for k in range(numbers.size):
        out[k] = numbers[k]


@compiled
def _raise(numbers: Any, by: Any) -> None:
    for k in range(numbers.size):
        numbers[k] = np.uint16(numbers[k] + by[k])


@compiled
def _start(tables: Any, total: Any, below: Any) -> None:
    """Turn what `_count` counted into the ranks that bins begin with, `below`.

    In `tables` they are those of each half's first element.
    """
    _sum_halves(tables[0], tables[1], total)
    first, last = below[:LANES], below.size - LANES
    first[:] = 0
    _sum_columns(total, below)
    rank = np.uint16(0)
    for k in range(LANES):
        first[k], rank = rank, np.uint16(rank + below[last + k] + total[last + k])
    for k in range(LANES, below.size, LANES):
        _raise(below[k : k + LANES], first)
    _raise(tables[0], below)
    _raise(tables[1], below)


@compiled
def _limits(below: Any, bounds: Any, lows: Any, highs: Any) -> None:
    """Put the bounds of each column's first and last rank into `lows` and `highs`."""
    last = np.int64(bounds.size - 1)
    for k in range(LANES):
        end = np.int64(below[k + 1]) - 1 if k + 1 < LANES else last
        lows[k] = bounds[min(np.int64(below[k]), last)]
        highs[k] = max(bounds[max(end, 0)], lows[k])


@compiled
def _compare(
    opened: Any,
    bits: Any,
    least: Any,
    drawn: Any,
    bounds: Any,
    begin: Any,
    room: Any,
    kept: Any,
    late: Any,
    count: Any,
) -> Any:
    """Choose among open elements by their bins; append those that these leave open."""
    bins, before, sums = room[0][0], room[0][1], room[2]
    for j in opened:
        bin_, draw = bins[j], np.uint16(drawn[j] ^ _HALF)
        fine, total = sums[2, bin_], sums[0, bin_]
        if fine < total and bits[j] == _plain(bits[j], least):
            high = np.uint16(begin[bin_] + before[j])
            low = np.uint16(max(high, fine) - fine)  # of those before it, fine ones are larger
        else:
            high = np.uint16(sums[1, bin_] + total - _ONE)
            low = np.uint16(high - fine + _ONE)
        kept[j] = np.uint8(draw < bounds[low])
        late[count] = j
        count += np.uint64((draw < bounds[low]) != (draw < bounds[high]))
    return count


@compiled
def _inside(values: Any, first: Any, width: Any) -> Any:
    count = np.int32(0)
    for j in range(values.size):
        count += np.int32(np.uint32(values[j] - first) < width)
    return count


@compiled
def _ranks(bits: Any) -> Any:
    """Return the ranks of all elements: sorted digit by digit, the lowest first."""
    tables = np.zeros((_DIGITS, 1 << _DIGIT), np.int32)
    mask = np.uint32((1 << _DIGIT) - 1)
    for j in range(bits.size):
        for digit in range(_DIGITS):
            tables[digit, (bits[j] >> np.uint32(digit * _DIGIT)) & mask] += 1
    order, other = np.arange(bits.size).astype(np.int32), np.empty(bits.size, np.int32)
    for digit in range(_DIGITS):
        shift, table, count = np.uint32(digit * _DIGIT), tables[digit], np.int32(0)
        if table[(bits[0] >> shift) & mask] == bits.size:
            continue  # all have this one
        for k in range(table.size):
            count, table[k] = count + table[k], count
        for j in order:
            value = (bits[j] >> shift) & mask
            other[table[value]] = j
            table[value] += 1
        order, other = other, order
    for rank in range(bits.size):
        other[order[rank]] = rank
    return other


@compiled
def _settle(
    late: Any,
    bits: Any,
    least: Any,
    drawn: Any,
    bounds: Any,
    places: Any,
    values: Any,
    room: Any,
    kept: Any,
) -> None:
    """Choose among elements `late` of a row by their ranks; fine are those at `places`."""
    bins, before, tables, sums = room[0][0], room[0][1], room[1], room[2]
    if late.size * values.size > _OFTEN * bits.size:
        ranks = _ranks(bits)
        for j in late:
            kept[j] = np.uint8(np.uint16(drawn[j] ^ _HALF) < bounds[ranks[j]])
        return
    for j in late:
        bin_, plain = bins[j], _plain(bits[j], least)
        total, below, fine = sums[0, bin_], sums[1, bin_], sums[2, bin_]
        ahead = values[: np.searchsorted(places, j)]
        if fine < total and bits[j] == plain:
            width = (np.uint32(least if plain == 0 else 0) + np.uint32(1)) << _SHIFT
            rank = np.int64(tables[0 if j < _half(bits) else 1, bin_]) + before[j]
            rank -= _inside(ahead, plain, np.uint32(width))
        else:
            rank = np.int64(below) + total - fine
            rank += _inside(values, plain, np.uint32(bits[j] - plain)) + equal(ahead, bits[j])
        kept[j] = np.uint8(np.uint16(drawn[j] ^ _HALF) < bounds[rank])


@compiled
def choose_row(bits: Any, high: Any, drawn: Any, bounds: Any, kept: Any, room: Any) -> None:
    """Put which elements of a row are kept into `kept`.

    Args:
        bits: uint32 [elements], of magnitudes in float32; fewer than 2¹⁶.
        high: uint32, the largest of them.
        drawn: int16 [elements].
        bounds: uint16 [elements], ascending: the draws, as unsigned numbers, that keep the element
            of a rank are below its bound.
        kept: uint8 [elements].
        room: what `rooms` returned.
    """
    bits, drawn, bounds, kept = borrowed(bits), borrowed(drawn), borrowed(bounds), borrowed(kept)
    lists, tables, sums = borrowed(room[0]), borrowed(room[1]), borrowed(room[2])
    limits, numbers, values = borrowed(room[3]), borrowed(room[4]), borrowed(room[5])
    bins, before, room = lists[0], lists[1], (lists, tables, sums)
    places, opened, late = numbers[0], numbers[1], numbers[2]
    least = np.uint16(max(high >> _SHIFT, np.uint32(_BINS - 1)) - np.uint32(_BINS - 1))
    row, half = bits.size, _half(bits)
    _place(bits, least, bins, before)
    places = places[: marked(before, places)]
    _count(bins, tables, before)
    _start(tables, sums[0], sums[1])
    if places.size * _CROWD > row:  # as if all were fine
        places, values = np.arange(row).astype(np.uint16), bits
        _copy(sums[0], sums[2])
    else:
        values = values[: places.size]
        sums[2] = 0
        for i in range(places.size):
            values[i] = bits[places[i]]
            sums[2, bins[places[i]]] += _ONE
    lows, highs = limits[0], limits[1]
    _limits(sums[1], bounds, lows, highs)
    count = np.uint64(0)
    for part in range(2):
        here = slice(half, row) if part else slice(0, half)
        first = half if part else 0
        found = sift(drawn[here], bins[here], first, lows, highs, kept[here], opened)
        more = (bits, least, drawn, bounds, tables[part], room, kept, late, count)
        count = _compare(opened[:found], *more)
    _settle(late[:count], bits, least, drawn, bounds, places, values, room, kept)


@compiled
def choose(bits: Any, row: Any, drawn: Any, bounds: Any, kept: Any) -> None:
    """Do as `choose_row` for all rows of `row` elements of `bits`."""
    room = rooms(row)
    for start in range(0, bits.size, row):
        end = start + row
        high = np.uint32(0)
        for j in range(start, end):
            high = max(high, bits[j])
        choose_row(bits[start:end], high, drawn[start:end], bounds, kept[start:end], room)


def warm(kind: Any) -> None:
    """Have everything compiled; magnitudes are float32."""
    bits, kept, bounds = np.zeros(2, np.uint32), np.zeros(2, np.uint8), np.zeros(2, np.uint16)
    choose(bits, 2, bounds.view(np.int16), bounds, kept)

"""Owns ranks within rows: which elements are kept for being large enough among those of their row.

No row is sorted. Magnitudes are counted by their upper bits. Differences of bfloat16 numbers mostly
have no lower bits: those of a bin are equal then, equal ones share the mean of their ranks, and the
counts tell it. Elements with lower bits, the fine ones, are listed; where they leave a rank open
that decides, it is found among them. Only a row in which that takes long is sorted.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeforge.kernels.listing import LANES, marked, sift
from moeforge.kernels.rows import borrowed, compiled

_BINS, _SHIFT, _UPPER = 2**10, np.uint32(16), np.uint32(0xFFFF0000)
"""Magnitudes are told apart by 7 bits of their fraction, in 8 powers of two below the largest."""
_ACROSS, _DOWN, _LAST = np.uint16(5), np.uint16(5), np.uint16(2**5 - 1)
"""Bins lie in 32 columns of 32, so that those before them are summed up 32 at a time."""
_HALF = np.int16(-(2**15))
_CROWD = 4
"""Where more than such a part of a row is fine, it does not pay to tell the others from them."""
_OFTEN = 2**8
"""Fine elements looked at, for each one of the row, from which on sorting it takes less."""
_ONE, _COLUMN = np.uint16(1), np.uint16(LANES - 1)


@compiled
def rooms(row: Any) -> Any:
    """Return the memory that `choose_row` needs for rows of so many elements."""
    return (
        np.empty((2, row), np.uint16),
        np.empty((2, _BINS), np.uint16),
        np.empty((3, _BINS), np.uint16),
        np.empty((3, LANES), np.uint16),
        np.empty((2, row + LANES), np.uint16),
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
def _count(bins: Any, tables: Any) -> None:
    """Put how many of each bin are in either half into `tables`."""
    half = bins.size // 2
    one, other, ones, others = bins[:half], bins[half:], tables[0], tables[1]
    tables[:] = 0
    # Side by side, for of equal values one count waits for the other.
    for j in range(half):
        ones[one[j]] += _ONE
        others[other[j]] += _ONE
    if half < other.size:
        others[other[half]] += _ONE


@compiled
def _sum_columns(ones: Any, others: Any, total: Any, below: Any) -> None:
    for k in range(total.size - LANES):
        total[k] = np.uint16(ones[k] + others[k])
        below[k + LANES] = np.uint16(below[k] + total[k])
    for k in range(total.size - LANES, total.size):
        total[k] = np.uint16(ones[k] + others[k])


@compiled
def _limits(total: Any, below: Any, bounds: Any, starts: Any, lows: Any, highs: Any) -> None:
    """Put the rank that each column begins with into `starts`, and the bounds of its ends.

    A column without elements is nobody's: its bounds are any.
    """
    rank, last, end = np.int64(0), below.size - LANES, bounds.size - 1
    for k in range(LANES):
        starts[k] = np.uint16(rank)
        lows[k] = bounds[min(2 * rank, end)]
        rank += np.int64(below[last + k]) + np.int64(total[last + k])
        highs[k] = bounds[max(2 * rank - 2, 0)]


@compiled
def _first(bin_: Any, sums: Any, starts: Any) -> Any:
    """Return the rank that a bin begins with."""
    return np.int64(sums[1, bin_]) + np.int64(starts[bin_ & _COLUMN])


@compiled
def _compare(
    opened: Any,
    bits: Any,
    least: Any,
    drawn: Any,
    bounds: Any,
    bins: Any,
    sums: Any,
    starts: Any,
    kept: Any,
) -> Any:
    """Choose among open elements by their bins; put those that these leave open first in `opened`.

    Returns:
        How many these are.
    """
    count = np.uint64(0)
    for j in opened:
        bin_, draw = bins[j], np.uint16(drawn[j] ^ _HALF)
        total, fine = np.int64(sums[0, bin_]), np.int64(sums[2, bin_])
        plain = total - fine
        is_plain = (plain > 0) & (bits[j] == _plain(bits[j], least))
        # No branch, which would be missed half the time.
        first = _first(bin_, sums, starts) + (0 if is_plain else plain)
        last = first + (plain if is_plain else fine) - 1
        low = bounds[first + (last if is_plain else first)]
        high = bounds[last + (first if is_plain else last)]
        kept[j] = np.uint8(draw < low)
        opened[count] = j
        count += np.uint64((draw < low) != (draw < high))
    return count


@compiled
def _around(values: Any, first: Any, value: Any) -> Any:
    """Return how many are at least `first` and less than `value`, and how many are equal to it."""
    less, equal = np.int32(0), np.int32(0)
    for j in range(values.size):
        less += np.int32(np.uint32(values[j] - first) < np.uint32(value - first))
        equal += np.int32(values[j] == value)
    return less, equal


@compiled
def _settle(
    late: Any,
    bits: Any,
    least: Any,
    drawn: Any,
    bounds: Any,
    bins: Any,
    sums: Any,
    starts: Any,
    fine: Any,
    kept: Any,
) -> None:
    """Choose among elements `late` of a row by their ranks; `fine` are all fine ones of it."""
    often = late.size * fine.size > _OFTEN * bits.size
    ordered = np.sort(bits) if often else bits
    for j in late:
        if often:
            first = np.searchsorted(ordered, bits[j])
            last = np.searchsorted(ordered, bits[j], side="right") - 1
        else:
            bin_ = bins[j]
            less, equal = _around(fine, _plain(bits[j], least), bits[j])
            first = _first(bin_, sums, starts) + sums[0, bin_] - sums[2, bin_] + less
            last = first + equal - 1
        kept[j] = np.uint8(np.uint16(drawn[j] ^ _HALF) < bounds[first + last])


@compiled
def choose_row(bits: Any, high: Any, drawn: Any, bounds: Any, kept: Any, room: Any) -> None:
    """Put which elements of a row are kept into `kept`.

    Args:
        bits: uint32 [elements], of magnitudes in float32; fewer than 2¹⁶.
        high: uint32, the largest of them.
        drawn: int16 [elements].
        bounds: uint16 [2·elements − 1], ascending: draws, as unsigned numbers, keep elements that
            are equal if they are below the bound numbered by the first's rank and the last's, added
            up.
        kept: uint8 [elements].
        room: what `rooms` returned.
    """
    bits, drawn, bounds, kept = borrowed(bits), borrowed(drawn), borrowed(bounds), borrowed(kept)
    lists, tables, sums = borrowed(room[0]), borrowed(room[1]), borrowed(room[2])
    limits, numbers = borrowed(room[3]), borrowed(room[4])
    bins, fine, places, opened = lists[0], lists[1], numbers[0], numbers[1]
    starts, lows, highs = limits[0], limits[1], limits[2]
    least = np.uint16(max(high >> _SHIFT, np.uint32(_BINS - 1)) - np.uint32(_BINS - 1))
    _place(bits, least, bins, fine)
    places = places[: marked(fine, places)]
    _count(bins, tables)
    sums[1, :LANES] = 0
    _sum_columns(tables[0], tables[1], sums[0], sums[1])
    _limits(sums[0], sums[1], bounds, starts, lows, highs)
    opened = opened[: sift(drawn, bins, lows, highs, kept, opened)]
    crowd = places.size * _CROWD > bits.size
    if crowd:  # as if all were fine
        sums[2] = sums[0]
    else:
        sums[2] = 0
        for j in places:
            sums[2, bins[j]] += _ONE
    more = (bits, least, drawn, bounds, bins, sums, starts)
    late = opened[: _compare(opened, *more, kept)]
    if late.size > 0:
        values = bits if crowd else bits[places]
        _settle(late, *more, values, kept)


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
    bits, kept, bounds = np.zeros(2, np.uint32), np.zeros(2, np.uint8), np.zeros(3, np.uint16)
    choose(bits, 2, np.zeros(2, np.int16), bounds, kept)

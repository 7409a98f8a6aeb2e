"""Owns ranks within rows: which elements are kept for being large enough among those of their row.

No row is sorted. A table of the magnitudes by their upper bits says, for all elements of a row,
between which two ranks theirs lies; where that leaves open what becomes of an element, it is
compared with its whole row. Only of a row in which that happens often, such as one of many equal
magnitudes, all ranks are worked out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeforge.kernels.counting import ROOM, collect, equal
from moeforge.kernels.rows import compiled

_BINS, _SHIFT = 2**11, np.uint32(16)
"""Magnitudes are told apart by 7 bits of their fraction, in 16 powers of two below the largest."""
_HALF = np.int32(2**15)
_PART, _PLACE = 2**15, np.uint32(15)
"""Elements whose number within the part and whose draw fit into 31 bits."""
_OFTEN = 100
"""Distinct magnitudes of a row from which on sorting it takes less than comparing each with all."""
_DIGIT, _DIGITS = np.uint32(11), 3


@compiled
def _bin(bits: Any, least: Any) -> Any:
    return max(bits >> _SHIFT, least) - least


@compiled
def _table(bits: Any, least: Any, tables: Any, below: Any) -> None:
    """Put how many of a row's elements are in a lower bin than each into `below` [bins + 1]."""
    tables[:] = 0  # four, for of equal values one count would wait for the other
    whole = bits.size // 4 * 4
    for j in range(0, whole, 4):
        tables[0, _bin(bits[j], least)] += 1
        tables[1, _bin(bits[j + 1], least)] += 1
        tables[2, _bin(bits[j + 2], least)] += 1
        tables[3, _bin(bits[j + 3], least)] += 1
    for j in range(whole, bits.size):
        tables[0, _bin(bits[j], least)] += 1
    for k in range(_BINS):
        tables[0, k] += tables[1, k] + tables[2, k] + tables[3, k]
    count = np.int32(0)
    for k in range(_BINS):
        below[k] = count
        count += tables[0, k]
    below[_BINS] = count


@compiled
def _smaller(bits: Any, value: Any) -> Any:
    count = np.int32(0)
    for j in range(bits.size):
        count += np.int32(bits[j] < value)
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
def _part(
    bits: Any,
    drawn: Any,
    limits: Any,
    needed: Any,
    least: Any,
    below: Any,
    kept: Any,
    room: Any,
    late: Any,
    count: Any,
    start: Any,
) -> Any:
    """Choose among the elements of a part of a row; append those left open to `late`."""
    surely, maybe = limits
    words, opened = room[0], room[1]
    for j in range(drawn.size):
        draw = np.int32(drawn[j]) + _HALF
        kept[j] = np.uint8(draw < surely)
        words[j] = (np.uint32(draw) << _PLACE) | np.uint32(j)
    first, width = np.uint32(surely) << _PLACE, np.uint32(maybe - surely) << _PLACE
    found = collect(words[: drawn.size], first, width, opened, np.uint64(0))
    for k in range(found):
        j, need = np.int64(opened[k] & np.uint32(_PART - 1)), needed[opened[k] >> _PLACE]
        where = _bin(bits[j], least)
        rank, next_ = below[where], below[where + 1]
        kept[j] = np.uint8(rank >= need)
        late[count] = start + j
        count += np.int64((rank < need) & (need < next_))
    return count


@compiled
def _settle(bits: Any, late: Any, drawn: Any, needed: Any, kept: Any) -> None:
    """Choose among elements `late` of a row, which are ascending; overwrites them."""
    distinct = 0
    for i in range(late.size):
        if late[i] < 0:
            continue
        distinct += 1
        if distinct > _OFTEN:
            ranks = _ranks(bits)
            for at in late[i:]:
                if at >= 0:
                    kept[at] = np.uint8(ranks[at] >= needed[np.int32(drawn[at]) + _HALF])
            return
        value, before = bits[late[i]], 0
        rank = _smaller(bits, value)
        for k in range(i, late.size):
            at = np.int64(late[k])
            if at >= 0 and bits[at] == value:
                rank += equal(bits[before:at], value)
                kept[at] = np.uint8(rank >= needed[np.int32(drawn[at]) + _HALF])
                late[k], before = -1, at


@compiled
def choose(bits: Any, row: Any, drawn: Any, limits: Any, needed: Any, kept: Any) -> None:
    """Put which elements are kept into `kept`.

    Args:
        bits: uint32 [elements], of magnitudes in float32; whole rows.
        row: elements of a row.
        drawn: int16 [elements].
        limits: int32 [2]: draws below the first, as unsigned numbers, keep whatever the rank; from
            the second on they keep nothing.
        needed: int32 [2¹⁶], for each draw the least rank that is kept.
        kept: uint8 [elements].
    """
    part = min(row, _PART)
    room = np.empty((2, part + ROOM), np.uint32)
    late = np.empty(row + 1, np.int32)
    tables, below = np.empty((4, _BINS), np.int32), np.empty(_BINS + 1, np.int32)
    both = (limits[0], limits[1])
    for start in range(0, bits.size, row):
        here = bits[start : start + row]
        high = np.uint32(0)
        for j in range(row):
            high = max(high, here[j])
        least = max(high >> _SHIFT, np.uint32(_BINS - 1)) - np.uint32(_BINS - 1)
        _table(here, least, tables, below)
        count = 0
        for first in range(0, row, part):
            end = min(first + part, row)
            count = _part(
                here[first:end],
                drawn[start + first : start + end],
                both,
                needed,
                least,
                below,
                kept[start + first : start + end],
                room,
                late,
                count,
                first,
            )
        _settle(here, late[:count], drawn[start : start + row], needed, kept[start : start + row])


def warm(kind: Any) -> None:
    """Have everything compiled; magnitudes are float32."""
    limits, needed = np.zeros(2, np.int32), np.zeros(2**16, np.int32)
    bits, kept = np.zeros(2, np.uint32), np.zeros(2, np.uint8)
    choose(bits, 2, np.zeros(2, np.int16), limits, needed, kept)

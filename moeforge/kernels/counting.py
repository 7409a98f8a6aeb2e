"""Owns magnitudes of differences from a base, and counting magnitudes around brackets."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from moeforge.kernels.rows import STRETCH, ZERO, as_float, borrowed, compiled, rows_of, wide, widen

BINS, TABLES = 2**10, 8
LANES = 16
LLVM = 20
"""The first LLVM that has an operation for it; an older one would end the process."""
ROOM = LANES
"""Elements beyond the last one that what is collected may be written over."""


@intrinsic  # type: ignore[untyped-decorator]
def _squeeze_lanes(
    typing: Any, values: Any, at: Any, first: Any, width: Any, out: Any, count: Any
) -> Any:
    """Append those of 16 uint32 `values` from `at` on that lie in a range to `out`.

    The range is that of `width` numbers from `first` on; `count` are there already. Returns how
    many there are then. 16 elements of `out` are written over, the last ones with anything.
    """
    signature = types.uint64(values, types.int64, types.uint32, types.uint32, out, types.uint64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lane = ir.IntType(32)
        vector, mask = ir.VectorType(lane, LANES), ir.VectorType(ir.IntType(1), LANES)

        def place(number: int, at: Any) -> Any:
            array = context.make_array(signature.args[number])(context, builder, args[number])
            return builder.bitcast(builder.gep(array.data, [at]), vector.as_pointer())

        def spread(value: Any) -> Any:
            nothing = ir.Constant(vector, ir.Undefined)
            one = builder.insert_element(nothing, value, ir.Constant(lane, 0))
            return builder.shuffle_vector(one, nothing, ir.Constant(vector, [0] * LANES))

        found = builder.load(place(0, args[1]), align=4)
        inside = builder.icmp_unsigned("<", builder.sub(found, spread(args[2])), spread(args[3]))
        kind = ir.FunctionType(vector, [vector, mask, vector])
        name = f"llvm.experimental.vector.compress.v{LANES}i32"
        squeeze = cgutils.get_or_insert_function(builder.module, kind, name)
        squeezed = builder.call(squeeze, [found, inside, ir.Constant(vector, ir.Undefined)])
        builder.store(squeezed, place(4, args[5]), align=4)
        lanes = builder.ctpop(builder.bitcast(inside, ir.IntType(LANES)))
        return builder.add(args[5], builder.zext(lanes, ir.IntType(64)))

    return signature, generate


@compiled
def _collect_vectors(bits: Any, first: Any, width: Any, out: Any, count: Any) -> Any:
    whole = bits.size // LANES * LANES
    for j in range(0, whole, LANES):
        count = _squeeze_lanes(bits, j, first, width, out, count)
    return whole, count


@compiled
def _collect_none(bits: Any, first: Any, width: Any, out: Any, count: Any) -> Any:
    return 0, count


_collect_most = _collect_vectors if binding.llvm_version_info[0] >= LLVM else _collect_none


@compiled
def collect(bits: Any, first: Any, width: Any, out: Any, count: Any) -> Any:
    """Append those of uint32 `bits` that are among the `width` numbers from `first` on to `out`.

    `count` are there already, uint64. Returns how many there are then; `out` is longer by ROOM.
    """
    done, count = _collect_most(bits, first, width, out, count)
    # Every element is written, and the next one over it unless it is to stay: no branch to miss.
    for j in range(done, bits.size):
        out[count] = bits[j]
        count += np.uint64(np.uint32(bits[j] - first) < width)
    return count


@compiled
def _reaching(values: Any, stop: Any) -> Any:
    count = np.int32(0)
    for j in range(values.size):
        count += np.int32(values[j] >= stop)
    return count


@compiled
def equal(values: Any, value: Any) -> Any:
    """Return how many of `values` are equal to `value`."""
    count = np.int32(0)
    for j in range(values.size):
        count += np.int32(values[j] == value)
    return count


@compiled
def tally(values: Any, first: Any, stop: Any, out: Any) -> Any:
    """Collect the magnitudes from `first` on and below `stop` into `out`, in their order.

    Args:
        values: [elements], not negative.
        first: float32, finite.
        stop: float32, may be infinite.
        out: longer than `values` by ROOM.

    Returns:
        How many are `stop` or more, and how many were collected.
    """
    ends = np.empty(2, np.float32)
    ends[0], ends[1] = first, stop
    bits, room, limits = values.view(np.uint32), out.view(np.uint32), ends.view(np.uint32)
    width = np.uint32(limits[1] - limits[0])
    reached, count = 0, np.uint64(0)
    for start in range(0, values.size, STRETCH):
        end = min(start + STRETCH, values.size)
        reached += _reaching(values[start:end], stop)
        count = collect(bits[start:end], limits[0], width, room, count)
    return reached, count


@compiled
def ranked(values: Any, rank: Any) -> Any:
    """Return the value of rank `rank`, 1 for the largest, and how many are at least as large.

    Args:
        values: float32, not negative.
        rank: from 1 to the number of values.
    """
    wanted = rank
    bits, room = values.view(np.uint32), np.empty(values.size + ROOM, np.uint32)
    low, high = np.uint32(0xFFFFFFFF), np.uint32(0)
    for j in range(bits.size):
        low, high = min(low, bits[j]), max(high, bits[j])
    # Of equal values one count would wait for the other, as it would a power of two further on.
    tables = np.empty((TABLES, BINS + 16), np.int32)
    while True:
        shift = 0
        while (high - low) >> np.uint32(shift) >= BINS:
            shift += 1
        tables[:] = 0
        for j in range(bits.size):
            tables[j & (TABLES - 1), (bits[j] - low) >> np.uint32(shift)] += 1
        place = BINS - 1
        here = tables[:, place].sum()
        while rank > here:
            rank -= here
            place -= 1
            here = tables[:, place].sum()
        low = np.uint32(low + (np.uint32(place) << np.uint32(shift)))
        if shift == 0:
            return as_float(low), wanted - rank + here
        width = np.uint32(1) << np.uint32(shift)
        high = np.uint32(low + width - np.uint32(1))
        # In place: what is kept goes where it was, or before that.
        bits = room[: collect(bits, low, width, room, np.uint64(0))]


@compiled
def _absolute_difference(row: Any, base: Any, out: Any) -> None:
    for j in range(row.size):
        out[j] = abs(wide(row[j]) - base[j])


@compiled
def magnitudes(matrix: Any, which: Any, out: Any) -> None:
    """Put the magnitudes of the differences of rows `which` from the first into rows of `out`."""
    room = np.empty(STRETCH, np.float32)
    for start in range(0, matrix.shape[1], STRETCH):
        end = min(start + STRETCH, matrix.shape[1])
        base = room[: end - start]
        widen(matrix[0, start:end], base)
        for i in range(which.size):
            _absolute_difference(matrix[which[i], start:end], base, out[i, start:end])


@compiled
def where(matrix: Any, which: Any, value: Any) -> Any:
    """Return the numbers of elements whose difference from the first row has a magnitude.

    Args:
        matrix: base and models.
        which: row of the model.
        value: float32, the magnitude.

    Returns:
        int64, ascending.
    """
    room, found, count = rows_of(2), np.empty(matrix.shape[1], np.int64), 0
    for start in range(0, matrix.shape[1], STRETCH):
        end = min(start + STRETCH, matrix.shape[1])
        base, row = room[0, : end - start], room[1, : end - start]
        widen(matrix[0, start:end], base)
        _absolute_difference(matrix[which, start:end], base, row)
        if equal(row, value) > 0:  # counting is for vectors, listing is not
            for j in range(row.size):
                if row[j] == value:
                    found[count] = start + j
                    count += 1
    return found[:count].copy()


@compiled
def _count(values: Any, stop: Any, low: Any, high: Any) -> Any:
    reached, lows, highs = np.int32(0), np.int32(0), np.int32(0)
    for j in range(values.size):
        reached += np.int32(values[j] >= stop)
        lows += np.int32(values[j] == low)
        highs += np.int32(values[j] == high)
    return reached, lows, highs


@compiled
def _tallies(matrix: Any, which: Any, limits: Any, spare: Any, room: Any, found: Any) -> None:
    matrix, spare = borrowed(matrix), borrowed(spare)
    borders, rooms = borrowed(limits.view(np.uint32)), borrowed(room.view(np.uint32))
    bits = spare.view(np.uint32)
    for start in range(0, matrix.shape[1], STRETCH):
        end = min(start + STRETCH, matrix.shape[1])
        base, row = spare[0, : end - start], spare[1, : end - start]
        widen(matrix[0, start:end], base)
        for i in range(which.size):
            if i == 0 or which[i] != which[i - 1]:
                _absolute_difference(matrix[which[i], start:end], base, row)
            first, stop, low, high = limits[i]
            if low == low or high == high:
                reached, lows, highs = _count(row, stop, low, high)
                found[i, 1] += lows
                found[i, 2] += highs
            else:
                reached = _reaching(row, stop)
            found[i, 0] += reached
            if first < stop:
                width = np.uint32(borders[i, 1] - borders[i, 0])
                here = bits[1, : end - start]
                found[i, 3] = collect(here, borders[i, 0], width, rooms[i], np.uint64(found[i, 3]))


def tallies(matrix: Any, which: Any, limits: Any, room: Any, found: Any) -> None:
    """Count the magnitudes of differences from the first row around brackets, and collect them.

    Args:
        matrix: base and models.
        which: int64 [brackets], ascending: the row that each is for.
        limits: float32 [brackets, 4]: `first`, from which on magnitudes are collected, `stop`,
            below which they are, and two values, or NaN.
        room: float32 [brackets, elements + ROOM], for what is collected.
        found: int64 [brackets, 4], for how many are `stop` or more, how many are equal to the first
            and to the second of the two values, and how many were collected.
    """
    found[:] = 0
    _tallies(matrix, which, limits, rows_of(2), room, found)


def warm(kind: Any) -> None:
    """Have everything compiled for matrices of numpy dtype `kind`."""
    matrix: Any = np.zeros((2, 2), kind)
    out, which = np.zeros((1, 2 + ROOM), np.float32), np.ones(1, np.int64)
    magnitudes(matrix, which, out)
    tally(out[0, :2], ZERO, np.float32(1.0), np.zeros(2 + ROOM, np.float32))
    ranked(out[0], 1)
    equal(out[0], ZERO)
    tallies(matrix, which, np.ones((1, 4), np.float32), out, np.zeros((1, 4), np.int64))
    where(matrix, 1, ZERO)

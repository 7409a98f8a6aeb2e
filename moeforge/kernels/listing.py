"""Owns listing elements by number, 32 at a time: those marked, and those that draws leave open."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from moeforge.kernels.counting import LLVM
from moeforge.kernels.rows import compiled

LANES = 32
"""Elements looked at together, and those beyond the last one that a list may be written over."""
_COLUMN, _HALF = np.uint16(LANES - 1), np.int16(-(2**15))
_LANE, _INDEX = ir.IntType(16), ir.IntType(32)
_VECTOR, _MASK = ir.VectorType(_LANE, LANES), ir.VectorType(ir.IntType(1), LANES)
_BYTES = ir.VectorType(ir.IntType(8), LANES)


class _Code:
    """The instructions of one function, being written.

    Args:
        context: numba's.
        builder: of llvmlite.
        signature: of the function.
        args: its arguments.
    """

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any) -> None:
        self.context, self.builder, self.types, self.args = context, builder, signature.args, args

    def place(self, number: int, at: Any, kind: Any = _VECTOR) -> Any:
        """Return where 32 elements of array argument `number` lie, from element `at` on."""
        array = self.context.make_array(self.types[number])(
            self.context, self.builder, self.args[number]
        )
        return self.builder.bitcast(self.builder.gep(array.data, [at]), kind.as_pointer())

    def load(self, number: int, at: Any) -> Any:
        """Return 32 elements of array argument `number`."""
        return self.builder.load(self.place(number, at), align=2)

    def spread(self, value: Any) -> Any:
        """Return a vector of one value."""
        nothing = ir.Constant(_VECTOR, ir.Undefined)
        one = self.builder.insert_element(nothing, value, ir.Constant(_INDEX, 0))
        zeros = ir.Constant(ir.VectorType(_INDEX, LANES), [0] * LANES)
        return self.builder.shuffle_vector(one, nothing, zeros)

    def looked_up(self, table: Any, lanes: Any) -> Any:
        """Return the lanes of `table` that `lanes` say, one instruction where there is one."""
        found = ir.Constant(_VECTOR, ir.Undefined)
        for lane in range(LANES):
            here = ir.Constant(_INDEX, lane)
            which = self.builder.zext(self.builder.extract_element(lanes, here), _INDEX)
            value = self.builder.extract_element(table, which)
            found = self.builder.insert_element(found, value, here)
        return found

    def append(self, inside: Any, first: Any, out: int, count: Any) -> Any:
        """Append the numbers of elements from `first` on that are `inside` to argument `out`.

        Returns the count.
        """
        lanes = ir.Constant(_VECTOR, list(range(LANES)))
        numbers = self.builder.add(self.spread(self.builder.trunc(first, _LANE)), lanes)
        kind = ir.FunctionType(_VECTOR, [_VECTOR, _MASK, _VECTOR])
        name = f"llvm.experimental.vector.compress.v{LANES}i16"
        squeeze = cgutils.get_or_insert_function(self.builder.module, kind, name)
        nothing = ir.Constant(_VECTOR, ir.Undefined)
        squeezed = self.builder.call(squeeze, [numbers, inside, nothing])
        self.builder.store(squeezed, self.place(out, count), align=2)
        more = self.builder.ctpop(self.builder.bitcast(inside, ir.IntType(LANES)))
        return self.builder.add(count, self.builder.zext(more, ir.IntType(64)))


@intrinsic  # type: ignore[untyped-decorator]
def _mark_lanes(typing: Any, marks: Any, at: Any, out: Any, count: Any) -> Any:
    """Append the numbers of those of 32 elements from `at` on that have a mark to `out`."""
    signature = types.uint64(marks, types.int64, out, types.uint64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = _Code(context, builder, signature, args)
        inside = builder.icmp_unsigned("!=", code.load(0, args[1]), ir.Constant(_VECTOR, None))
        return code.append(inside, args[1], 2, args[3])

    return signature, generate


@intrinsic  # type: ignore[untyped-decorator]
def _sift_lanes(
    typing: Any,
    drawn: Any,
    bins: Any,
    at: Any,
    lows: Any,
    highs: Any,
    kept: Any,
    out: Any,
    count: Any,
) -> Any:
    """Do as `sift` with 32 elements; one instruction looks up in a table of as many."""
    signature = types.uint64(*(drawn, bins, types.int64, lows, highs, kept, out, types.uint64))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code, zero = _Code(context, builder, signature, args), ir.Constant(ir.IntType(64), 0)
        half = code.spread(ir.Constant(_LANE, int(_HALF)))
        draws = builder.xor(code.load(0, args[2]), half)
        columns = builder.and_(code.load(1, args[2]), code.spread(ir.Constant(_LANE, int(_COLUMN))))
        below = builder.icmp_unsigned("<", draws, code.looked_up(code.load(3, zero), columns))
        maybe = builder.icmp_unsigned("<", draws, code.looked_up(code.load(4, zero), columns))
        builder.store(builder.zext(below, _BYTES), code.place(5, args[2], _BYTES), align=1)
        return code.append(builder.and_(maybe, builder.not_(below)), args[2], 6, args[7])

    return signature, generate


@compiled
def _mark_vectors(marks: Any, out: Any) -> Any:
    whole, count = marks.size // LANES * LANES, np.uint64(0)
    for j in range(0, whole, LANES):
        count = _mark_lanes(marks, j, out, count)
    return whole, count


@compiled
def _mark_none(marks: Any, out: Any) -> Any:
    return 0, np.uint64(0)


@compiled
def _sift_vectors(drawn: Any, bins: Any, lows: Any, highs: Any, kept: Any, out: Any) -> Any:
    whole, count = drawn.size // LANES * LANES, np.uint64(0)
    for j in range(0, whole, LANES):
        count = _sift_lanes(drawn, bins, j, lows, highs, kept, out, count)
    return whole, count


@compiled
def _sift_none(drawn: Any, bins: Any, lows: Any, highs: Any, kept: Any, out: Any) -> Any:
    return 0, np.uint64(0)


_LANED = binding.llvm_version_info[0] >= LLVM
_mark_most = _mark_vectors if _LANED else _mark_none
_sift_most = _sift_vectors if _LANED else _sift_none


@compiled
def marked(marks: Any, out: Any) -> Any:
    """Put the numbers of elements that have a mark into `out`, and return how many they are.

    Args:
        marks: uint16 [elements], fewer than 2¹⁶; zero for none.
        out: uint16, longer by LANES.
    """
    done, count = _mark_most(marks, out)
    for j in range(done, marks.size):
        out[count] = np.uint16(j)
        count += np.uint64(marks[j] != 0)
    return count


@compiled
def sift(drawn: Any, bins: Any, lows: Any, highs: Any, kept: Any, out: Any) -> Any:
    """Keep elements by draw and column, and put the numbers of those left open into `out`.

    Args:
        drawn: int16 [elements], fewer than 2¹⁶.
        bins: uint16 [elements], with the column in the lowest bits.
        lows: uint16 [LANES], for each column the number below which draws, as unsigned ones, keep.
        highs: uint16 [LANES], not smaller: from there on they do not.
        kept: uint8 [elements], for ones and zeros.
        out: uint16, longer than the elements by LANES.

    Returns:
        How many are left open.
    """
    done, count = _sift_most(drawn, bins, lows, highs, kept, out)
    for j in range(done, drawn.size):
        draw, column = np.uint16(drawn[j] ^ _HALF), bins[j] & _COLUMN
        kept[j] = np.uint8(draw < lows[column])
        out[count] = np.uint16(j)
        count += np.uint64((draw >= lows[column]) & (draw < highs[column]))
    return count

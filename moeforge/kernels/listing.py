"""Owns listing the elements whose values lie in a range, by their numbers."""

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


@intrinsic  # type: ignore[untyped-decorator]
def _append_lanes(
    typing: Any,
    values: Any,
    at: Any,
    number: Any,
    first: Any,
    width: Any,
    out: Any,
    count: Any,
) -> Any:
    """Do as `_append_each`, by the vector instruction that squeezes lanes together."""
    signature = types.uint64(
        *(values, types.int64, types.uint16, types.uint16, types.uint16, out, types.uint64)
    )

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lane = ir.IntType(16)
        vector, mask = ir.VectorType(lane, LANES), ir.VectorType(ir.IntType(1), LANES)

        def place(number: int, at: Any) -> Any:
            array = context.make_array(signature.args[number])(context, builder, args[number])
            return builder.bitcast(builder.gep(array.data, [at]), vector.as_pointer())

        def spread(value: Any) -> Any:
            nothing = ir.Constant(vector, ir.Undefined)
            one = builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
            zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
            return builder.shuffle_vector(one, nothing, zeros)

        found = builder.load(place(0, args[1]), align=2)
        inside = builder.icmp_unsigned("<", builder.sub(found, spread(args[3])), spread(args[4]))
        numbers = builder.add(spread(args[2]), ir.Constant(vector, list(range(LANES))))
        kind = ir.FunctionType(vector, [vector, mask, vector])
        name = f"llvm.experimental.vector.compress.v{LANES}i16"
        squeeze = cgutils.get_or_insert_function(builder.module, kind, name)
        squeezed = builder.call(squeeze, [numbers, inside, ir.Constant(vector, ir.Undefined)])
        builder.store(squeezed, place(5, args[6]), align=2)
        lanes = builder.ctpop(builder.bitcast(inside, ir.IntType(LANES)))
        return builder.add(args[6], builder.zext(lanes, ir.IntType(64)))

    return signature, generate


@compiled
def _append_each(
    values: Any, at: Any, number: Any, first: Any, width: Any, out: Any, count: Any
) -> Any:
    """Append numbers of those of 32 uint16 `values` from `at` on that lie in a range to `out`.

    The first one's is `number`, the range that of `width` values from `first` on; `count` are there
    already. Returns how many there are then. As many elements of `out` are written over, the last
    ones with anything.
    """
    for j in range(LANES):
        out[count] = np.uint16(number + np.uint16(j))
        count += np.uint64(np.uint16(values[at + j] - first) < width)
    return count


_append = _append_lanes if binding.llvm_version_info[0] >= LLVM else _append_each


@compiled
def numbers(values: Any, number: Any, first: Any, width: Any, out: Any, count: Any) -> Any:
    """Append the numbers of those `values` that are among `width` from `first` on to `out`.

    Args:
        values: uint16.
        number: int64, the first one's; all are below 2¹⁶.
        first: uint16; the range goes on at zero where it reaches 2¹⁶.
        width: uint16.
        out: uint16, longer by LANES than what it will hold.
        count: uint64, how many are there already.

    Returns:
        How many are there then.
    """
    whole = values.size // LANES * LANES
    for j in range(0, whole, LANES):
        count = _append(values, j, np.uint16(number + j), first, width, out, count)
    for j in range(whole, values.size):
        out[count] = np.uint16(number + j)
        count += np.uint64(np.uint16(values[j] - first) < width)
    return count

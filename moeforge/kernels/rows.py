"""Owns how kernels are compiled, and the loops over one row that several of them have in common.

Matrices are [inputs, elements] of uint16, the bits of bfloat16, or of float32, a base first;
results are float32. Everything is done in stretches of a few thousand bytes that stay in the
first-level cache, by simple loops over one row each, which LLVM turns into vector instructions;
`fastmath` is off, so it changes neither order nor rounding. Constants are float32, or numba would
go on in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import config, float32, njit, types, uint32
from numba.extending import intrinsic, overload

from moeforge.kernels.keeping import folder

STRETCH = 1024
PADDED = STRETCH + 16
"""Elements from one row to the next where rows would share the same few cache lines otherwise."""
ZERO, ONE = np.float32(0.0), np.float32(1.0)


def compiled(function: Any) -> Any:
    """Return `function`, compiled when it is first called; threads may run it side by side."""
    before, config.CACHE_DIR = config.CACHE_DIR, str(folder())  # asked for here, once
    try:
        return njit(nogil=True, error_model="numpy", fastmath=False, cache=True)(function)
    finally:
        config.CACHE_DIR = before


@intrinsic  # type: ignore[untyped-decorator]
def as_float(typing: Any, bits: Any) -> Any:
    """Return the float32 of `bits`, uint32; without a way through memory."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return float32(uint32), generate


@intrinsic  # type: ignore[untyped-decorator]
def as_bits(typing: Any, value: Any) -> Any:
    """Return the bits of `value`, float32, as uint32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.uint32))

    return uint32(float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def borrowed(typing: Any, array: Any) -> Any:
    """Return `array` without a share in its memory, for a function that was given it.

    Its parts are not counted then: where a loop has branches, counting takes longer than what a
    row needs. Never of what the function itself has allocated.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        made = context.make_array(signature.args[0])(context, builder, value=args[0])
        made.meminfo, made.parent = made.meminfo.type(None), made.parent.type(None)
        return made._getvalue()

    return array(array), generate


def wide(value: Any) -> Any:
    """Return `value`, the bits of a bfloat16 or a float32, as float32."""


@overload(wide)  # type: ignore[untyped-decorator]
def _wide_compiled(value: Any) -> Any:
    if value == types.uint16:

        def widened(value: Any) -> Any:
            return as_float(np.uint32(value) << np.uint32(16))

        return widened

    def same(value: Any) -> Any:
        return value

    return same


def store(out: Any, j: Any, value: Any) -> None:
    """Put float32 `value` into `out`, float32, or rounded into the bits of bfloat16."""


@overload(store)  # type: ignore[untyped-decorator]
def _store_compiled(out: Any, j: Any, value: Any) -> Any:
    if out.dtype == types.uint16:

        def rounded(out: Any, j: Any, value: Any) -> None:
            # To the nearest, of two the even; every NaN becomes the same, as in torch.
            bits = as_bits(value)
            near = (
                bits + ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
            ) >> np.uint32(16)
            out[j] = np.uint16(near if value == value else np.uint32(0x7FC0))

        return rounded

    def kept(out: Any, j: Any, value: Any) -> None:
        out[j] = value

    return kept


def widen(values: Any, out: Any) -> None:
    """Put `values`, bits of bfloat16 or float32, into float32 `out`."""


@overload(widen, jit_options={"error_model": "numpy"})  # type: ignore[untyped-decorator]
def _widen_compiled(values: Any, out: Any) -> Any:
    if values.dtype == types.uint16:

        def bits(values: Any, out: Any) -> None:
            wide = out.view(np.uint32)
            for j in range(values.size):
                wide[j] = np.uint32(values[j]) << np.uint32(16)

        return bits

    def copy(values: Any, out: Any) -> None:
        for j in range(values.size):
            out[j] = values[j]

    return copy


@compiled
def rows_of(count: Any) -> Any:
    """Return memory for float32 [count, PADDED], each row from the start of a cache line on."""
    room = np.empty(count * PADDED + 16, np.float32)
    first = -(room.ctypes.data // 4) % 16
    return room[first : first + count * PADDED].reshape(count, PADDED)


@compiled
def add(total: Any, row: Any) -> None:
    """Add `row` to `total`."""
    for j in range(row.size):
        total[j] += row[j]


@compiled
def subtract(row: Any, base: Any) -> None:
    """Subtract `base` from `row`."""
    for j in range(row.size):
        row[j] = row[j] - base[j]


@compiled
def sign_of(total: Any) -> Any:
    """Return the sign of a sum, 1 or −1; 1 where it is zero."""
    return -ONE if total < ZERO else ONE


@compiled
def majority(total: Any, sign: Any) -> None:
    """Put the signs of sums into `sign`, 1 or −1; 1 where they are zero."""
    for j in range(total.size):
        sign[j] = sign_of(total[j])

"""Owns finding values that are not finite in the raw bytes of a tensor; knows no file and no torch.

A float's exponent has all bits set in NaN and infinities, so of positive numbers the largest, their
bits taken for integers, tells whether there are any, and of negative ones, too: two maxima, over
signed and over unsigned integers.
"""

from __future__ import annotations

from typing import NamedTuple

from moeforge.tensors import DType


class _Bits(NamedTuple):
    """How a float is stored: numpy's integer of its size, the bit of the sign, infinity."""

    integer: str
    sign: int
    infinity: int


_AT_A_TIME = 2**18
"""Values looked at together: few enough that they stay in the cache."""

_FLOATS = {
    "float64": _Bits("<u8", 1 << 63, 0x7FF0_0000_0000_0000),
    "float32": _Bits("<u4", 1 << 31, 0x7F80_0000),
    "float16": _Bits("<u2", 1 << 15, 0x7C00),
    "bfloat16": _Bits("<u2", 1 << 15, 0x7F80),
    "float8_e5m2": _Bits("|u1", 1 << 7, 0x7C),
    # These have no infinity: the number before the code of NaN is an ordinary one.
    "float8_e4m3fn": _Bits("|u1", 1 << 7, 0x7F),
    "float8_e8m0fnu": _Bits("|u1", 0, 0xFF),
}


class Odd(NamedTuple):
    """How many values are not finite."""

    nan: int
    infinite: int


def count_odd(raw: memoryview | bytes, dtype: DType) -> Odd:
    """Count the values in `raw`, whole elements of `dtype`, that are not finite."""
    bits = _FLOATS.get(dtype.name)
    if bits is None or not len(raw):
        return Odd(0, 0)  # integers all are
    import numpy as np

    whole, odd, infinite = np.frombuffer(raw, dtype=bits.integer), 0, 0
    signed = bits.integer.replace("u", "i")
    for first in range(0, len(whole), _AT_A_TIME):
        part = whole[first : first + _AT_A_TIME]
        # Without a sign there are no negative numbers, and the first look tells everything.
        largest = part.max() >= bits.sign | bits.infinity
        if largest or (bits.sign and part.view(signed).max() >= bits.infinity):
            codes = part & whole.dtype.type(~bits.sign & np.iinfo(bits.integer).max)
            odd += int((codes >= bits.infinity).sum())
            infinite += int((codes == bits.infinity).sum())
    if dtype.name in ("float8_e4m3fn", "float8_e8m0fnu"):
        return Odd(odd, 0)
    return Odd(odd - infinite, infinite)

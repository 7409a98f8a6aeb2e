"""Owns packing choices, zeros and ones, eight to a byte as numpy does, and unpacking them."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeforge.kernels.rows import compiled

_EIGHT = np.uint64(0x8040201008040201)
"""Ones nine bits apart. Multiplied with eight bytes, zeros and ones, it gathers them in the
uppermost; with one byte, it puts each bit into a byte of its own. No two of the products meet."""
_TOP, _SEVEN, _ONES = np.uint64(56), np.uint64(7), np.uint64(0x0101010101010101)


@compiled
def pack(choices: Any, out: Any) -> None:
    """Put uint8 `choices` [elements] into uint8 `out` [elements / 8]."""
    words = choices.view(np.uint64)
    for j in range(out.size):
        out[j] = np.uint8((words[j] * _EIGHT) >> _TOP)


@compiled
def unpack(packed: Any, out: Any) -> None:
    """Put the choices of uint8 `packed` [elements / 8] into uint8 `out` [elements]."""
    words = out.view(np.uint64)
    for j in range(packed.size):
        words[j] = ((np.uint64(packed[j]) * _EIGHT) >> _SEVEN) & _ONES

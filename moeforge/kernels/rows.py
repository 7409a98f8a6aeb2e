"""Owns how kernels are compiled, and the loops over one row that several of them have in common.

Matrices are [inputs, elements] of uint16, the bits of bfloat16, or of float32, a base first;
results are float32. Everything is done in stretches of a few thousand bytes that stay in the
first-level cache, by simple loops over one row each, which LLVM turns into vector instructions;
`fastmath` is off, so it changes neither order nor rounding. Constants are float32, or numba would
go on in float64.

numba keeps what it compiled until the kernel's own file changes: after a change here, remove
`__pycache__` of this folder.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

STRETCH = 1024
ZERO, ONE = np.float32(0.0), np.float32(1.0)
_TINIEST = np.float32(2.0**-126)


def compiled(function: Any) -> Any:
    """Return `function`, compiled when it is first called; threads may run it side by side."""
    return njit(nogil=True, error_model="numpy", fastmath=False, cache=True)(function)


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
def majority(total: Any) -> None:
    """Turn sums into their signs, 1 or −1; 1 where they are zero."""
    for j in range(total.size):
        value = total[j] + _TINIEST
        total[j] = ONE if value > ZERO else (-ONE if value < ZERO else ZERO)

"""Owns the dtype table and `TensorSpec`; knows no file, no model and no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class DType:
    """A storage type of the safetensors format.

    Attributes:
        name: torch's name for it, as recipes and config.json spell it.
        code: safetensors' name for it.
        itemsize: bytes per element.
        mergeable: whether arithmetic may be done on it: float8 codes need their scales, and
            integers are exact.
    """

    name: str
    code: str
    itemsize: int
    mergeable: bool = False

    def __str__(self) -> str:
        return self.name


_TABLE = (
    DType("float64", "F64", 8, True),
    DType("float32", "F32", 4, True),
    DType("float16", "F16", 2, True),
    DType("bfloat16", "BF16", 2, True),
    DType("float8_e4m3fn", "F8_E4M3", 1),
    DType("float8_e5m2", "F8_E5M2", 1),
    DType("float8_e8m0fnu", "F8_E8M0", 1),
    DType("int64", "I64", 8),
    DType("int32", "I32", 4),
    DType("int16", "I16", 2),
    DType("int8", "I8", 1),
    DType("uint64", "U64", 8),
    DType("uint32", "U32", 4),
    DType("uint16", "U16", 2),
    DType("uint8", "U8", 1),
    DType("bool", "BOOL", 1),
)
BY_NAME = {dtype.name: dtype for dtype in _TABLE}
BY_CODE = {dtype.code: dtype for dtype in _TABLE}
FLOAT32 = BY_NAME["float32"]
OUTPUT_NAMES = tuple(dtype.name for dtype in _TABLE if dtype.mergeable)
"""Dtypes that a recipe may ask for."""


def promote(dtypes: Iterable[DType]) -> DType:
    """Return the dtype that holds all of `dtypes` without loss, by torch's promotion of floats."""
    distinct = set(dtypes)
    if len(distinct) == 1:
        return distinct.pop()
    return BY_NAME["float64"] if BY_NAME["float64"] in distinct else FLOAT32


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of a tensor, as its header gives them."""

    dtype: DType
    shape: tuple[int, ...]

    @cached_property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"

"""Owns the memory that a worker allocates once: read into as bytes, computed on as tensors."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

import torch

from moeforge.tensors import DType

if TYPE_CHECKING:
    from torch import Tensor


def torch_dtype(dtype: DType) -> torch.dtype:
    """Return torch's object for `dtype`."""
    found: torch.dtype = getattr(torch, dtype.name)
    return found


class Buffer:
    """Bytes of memory, seen as memory for reads and as a tensor for arithmetic.

    Args:
        nbytes: how many.
        pinned: whether a GPU copies from and to it: at the speed of the bus, and meanwhile.
    """

    def __init__(self, nbytes: int, *, pinned: bool = False) -> None:
        self.size = nbytes
        if pinned:
            self.bytes = torch.empty(max(nbytes, 1), dtype=torch.uint8, pin_memory=True)
            self.memory = self.bytes.numpy().data
        else:
            self.memory = memoryview(mmap.mmap(-1, max(nbytes, 1)))
            self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)
        self._seen: tuple[Any, ...] = ()

    def tensor(self, dtype: torch.dtype, count: int, first: int = 0) -> Tensor:
        """Return `count` elements from byte `first` on as `dtype`."""
        # Slice after slice asks for the same, and torch takes microseconds for it.
        if self._seen[1:] != (dtype, count, first):
            part = self.bytes[first : first + count * dtype.itemsize].view(dtype)
            self._seen = (part, dtype, count, first)
        seen: Tensor = self._seen[0]
        return seen

    def view(self, nbytes: int, first: int = 0) -> memoryview:
        """Return `nbytes` bytes from byte `first` on."""
        return self.memory[first : first + nbytes]

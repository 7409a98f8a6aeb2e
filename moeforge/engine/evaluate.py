"""Owns evaluating expressions slice by slice, in buffers that a worker allocates once.

float32 arithmetic (float64 where an input is float64), one rounding at the end.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from moeforge import methods
from moeforge.plans import Concat, Expr, Fill, Merge, Plan, Read
from moeforge.tensors import DType

if TYPE_CHECKING:
    from torch import Tensor

    from moeforge.sources import Source

BLOCK = 2**16
"""Elements per measured block: fixed, so that sums do not depend on the slice size."""

Stats = dict[int, tuple[float, ...]]


def torch_dtype(dtype: DType) -> torch.dtype:
    """Return torch's object for `dtype`."""
    found: torch.dtype = getattr(torch, dtype.name)
    return found


class Buffer:
    """Bytes for one slice, seen as memory for reads and as a tensor for arithmetic."""

    def __init__(self, elements: int) -> None:
        self.memory = mmap.mmap(-1, max(elements, 1) * 8)
        self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)

    def tensor(self, dtype: torch.dtype, count: int) -> Tensor:
        """Return the first `count` elements as `dtype`."""
        return self.bytes[: count * dtype.itemsize].view(dtype)

    def view(self, nbytes: int) -> memoryview:
        """Return the first `nbytes` bytes."""
        return memoryview(self.memory)[:nbytes]


class Evaluator:
    """One worker's buffers and the plan it reads from.

    Args:
        plan: holds the sources.
        slice_elements: elements per slice, a multiple of BLOCK.
        device: torch device of the arithmetic.
    """

    def __init__(self, plan: Plan, slice_elements: int, device: str = "cpu") -> None:
        torch.set_num_threads(1)  # of this worker: the workers are the parallelism
        self._sources = plan.sources
        self._size = slice_elements
        self._device = torch.device(device)
        self._staging = Buffer(slice_elements)
        self._output = Buffer(slice_elements)
        self._pool: list[Buffer] = []
        self._used = 0

    def produce(
        self, expr: Expr, working: DType, dtype: DType, stats: Stats, start: int, count: int
    ) -> Iterator[tuple[int, memoryview]]:
        """Yield element offset and bytes, in `dtype`, of each slice of [start, start + count).

        The bytes are valid until the next slice.
        """
        if isinstance(expr, Read) and self._sources[expr.source].specs()[expr.name].dtype == dtype:
            yield from self._copy(self._sources[expr.source], expr.name, dtype, start, count)
            return
        stored = torch_dtype(dtype)
        for begin in range(start, start + count, self._size):
            length = min(self._size, start + count - begin)
            result = self._evaluate(expr, torch_dtype(working), stats, begin, length)
            self._output.tensor(stored, length).copy_(result)
            self._used = 0
            yield begin, self._output.view(length * dtype.itemsize)

    def _copy(
        self, source: Source, name: str, dtype: DType, start: int, count: int
    ) -> Iterator[tuple[int, memoryview]]:
        for begin in range(start, start + count, self._size):
            data = self._output.view(min(self._size, start + count - begin) * dtype.itemsize)
            source.read(name, begin * dtype.itemsize, data)
            yield begin, data

    def measure(
        self, node: Merge, working: DType, stats: Stats, start: int, count: int
    ) -> list[tuple[float, ...]]:
        """Return what the method of `node` measures on each block of [start, start + count)."""
        method = methods.load(node.method)
        assert method.measure is not None
        params = dict(node.params)
        sums = []
        for begin in range(start, start + count, self._size):
            length = min(self._size, start + count - begin)
            tensors = [
                self._evaluate(child, torch_dtype(working), stats, begin, length)
                for child in node.inputs
            ]
            for low in range(0, length, BLOCK):
                sums.append(method.measure([t[low : low + BLOCK] for t in tensors], params))
            self._used = 0
        return sums

    def _take(self) -> Buffer:
        if self._used == len(self._pool):
            self._pool.append(Buffer(self._size))
        self._used += 1
        return self._pool[self._used - 1]

    def _evaluate(
        self, expr: Expr, working: torch.dtype, stats: Stats, start: int, count: int
    ) -> Tensor:
        """Return elements [start, start + count) of `expr` in a buffer that the caller may use."""
        if isinstance(expr, Merge):
            mark = self._used
            tensors: Sequence[Tensor] = [
                self._evaluate(child, working, stats, start, count) for child in expr.inputs
            ]
            method = methods.load(expr.method)
            result = method.merge(tensors, dict(expr.params), stats.get(id(expr), ()))
            if result is not tensors[0] and self._device.type == "cpu":
                result = tensors[0].copy_(result)
            self._used = mark + 1  # the first input's buffer holds the result, the rest is free
            return result
        target = self._take().tensor(working, count)
        if isinstance(expr, Fill):
            return target.fill_(expr.value).to(self._device)
        assert not isinstance(expr, Concat), "planned tensors are divided into pieces before"
        source = self._sources[expr.source]
        dtype = source.specs()[expr.name].dtype
        staging = self._staging
        source.read(expr.name, start * dtype.itemsize, staging.view(count * dtype.itemsize))
        raw = staging.tensor(torch_dtype(dtype), count)
        if self._device.type != "cpu":
            return raw.to(self._device).to(working, copy=True)
        return target.copy_(raw)

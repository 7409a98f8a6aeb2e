"""Owns evaluating expressions slice by slice, in buffers that a worker allocates once.

float32 arithmetic (float64 where an input or the result is float64), one rounding at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from moeforge import kernels, methods
from moeforge.engine import noise, reshape, rows
from moeforge.engine.buffers import Buffer, torch_dtype
from moeforge.engine.reading import Reader
from moeforge.engine.slices import needs_rows, spans, unit
from moeforge.methods import BLOCK, CHUNK, PADDING, Method, Place, Scan
from moeforge.plans import (
    Affine,
    Columns,
    Concat,
    Expr,
    Fill,
    Gather,
    Merge,
    Noise,
    Plan,
    Read,
    Rows,
    Same,
    Shaped,
    Transpose,
    inputs,
    walk,
)
from moeforge.tensors import BY_NAME, DType

if TYPE_CHECKING:
    from torch import Tensor

    from moeforge.engine.rows import Whole

_MOVES = (Gather, Rows, Columns, Transpose)
"""Expressions whose elements do not lie where those of their inputs do."""

Stats = Mapping[int, Any]
"""What is known of whole tensors, by id of the expression."""


class _Merging(NamedTuple):
    """What does not change from slice to slice of a merge.

    Attributes:
        method: its method.
        params: the method's.
        shape: of the tensor.
        by_rows: whether slices are made of whole rows.
        working: dtype of the arithmetic.
        as_stored: whether the method takes its inputs in bfloat16, in which all of them are stored.
    """

    method: Method
    params: dict[str, Any]
    shape: tuple[int, ...]
    by_rows: bool
    working: torch.dtype
    as_stored: bool


class Evaluator:
    """One worker's buffers and the plan it reads from.

    Args:
        plan: holds the sources.
        slice_elements: elements per slice, at most; a multiple of BLOCK.
        device: torch device of the arithmetic.
    """

    def __init__(self, plan: Plan, slice_elements: int, device: str = "cpu") -> None:
        torch.set_num_threads(1)  # of this worker: the workers are the parallelism
        self.plan = plan
        self._size = slice_elements
        self.device = torch.device(device)
        # Of its own: what one worker copies and what another computes goes on side by side.
        self._stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._output = Buffer(0)
        self._pool: list[Buffer] = []
        self._used = 0
        self._reader = Reader(plan, pinned=self._stream is not None, settle=self.settle)
        self._merging: dict[int, _Merging] = {}
        self.bands: dict[tuple[int, torch.dtype], reshape.Band] = {}

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Have torch compute a chunk without autograd, on a GPU in this worker's stream.

        At the end all of it is done: what is handed on can be used by any worker. Files that it was
        read from are closed.
        """
        stream = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        try:
            with torch.inference_mode(), stream:
                yield
                self.settle()
        finally:
            self._reader.close()

    def settle(self) -> None:
        """Wait until a GPU has done what it was asked for by this worker."""
        if self._stream is not None:
            self._stream.synchronize()
            self._reader.settled()

    def release(self) -> None:
        """Take back all memory that was in use when something failed."""
        self._used = 0
        self.bands.clear()

    def shrink(self, expr: Expr, count: int) -> str:
        """Take smaller slices, and at last the CPU; return what was done, empty if nothing can be.

        For a device whose memory is short: what it computes does not depend on the slices. Those of
        whole rows stay as they are, for what is computed of rows may depend on how many they are.

        Args:
            expr: what there was no memory for.
            count: elements of it that were wanted: a tensor may be smaller than slices are.
        """
        if self.device.type == "cpu":
            return ""
        size = min(self._size, count)
        if size > BLOCK and not needs_rows(expr):
            self._size = max(1, size // 2 // BLOCK) * BLOCK
            torch.cuda.empty_cache()
            return f"memory of {self.device} is short: slices of {self._size} elements"
        before, self.device, self._stream = self.device, torch.device("cpu"), None
        return f"memory of {before} is short: going on with the CPU, whose last bits may differ"

    def begin(self, expr: Expr, end: int | None = None) -> None:
        """Prepare for a chunk of `expr`: forget what was read for others.

        Args:
            expr: what is computed next.
            end: element where the chunk ends, so that nothing is read in vain beyond it.
        """
        parts = list(walk(expr))
        moves = any(isinstance(part, _MOVES) for part in parts)
        reads = (part for part in parts if isinstance(part, Read))
        self._reader.begin(reads, None if moves else end)
        self._merging.clear()
        wanted = {id(part) for part in parts}
        self.bands = {key: band for key, band in self.bands.items() if key[0] in wanted}

    def slices(
        self, expr: Expr, working: torch.dtype, start: int, count: int
    ) -> Iterator[tuple[int, int]]:
        """Yield start and length of each slice of [start, start + count)."""
        step = unit(self.plan, expr)
        if not needs_rows(expr) or self._grouped(expr, working):
            step *= max(1, self._size // step)
        elif self._stream is not None:  # always the same groups of rows here, too, and large ones
            step *= max(1, CHUNK // step)
        return spans(start, count, step)

    def _grouped(self, expr: Expr, working: torch.dtype) -> bool:
        """Say whether kernels take several groups of rows at a time."""
        if not isinstance(expr, Merge):
            return False
        merging = self._known(expr, working)
        return merging.as_stored and merging.method.grouped

    def produce(
        self, expr: Expr, working: DType, dtype: DType, whole: Whole, start: int, count: int
    ) -> Iterator[tuple[int, memoryview]]:
        """Yield element offset and bytes, in `dtype`, of each slice of [start, start + count).

        The bytes are valid until the next slice.
        """
        self.begin(expr, start + count)
        size, is_stored = dtype.itemsize, self._stored(expr) == dtype
        with self._arithmetic():
            for begin, length in self.slices(expr, torch_dtype(working), start, count):
                if self._output.size < length * size:
                    self._output = Buffer(length * size, pinned=self._stream is not None)
                data = self._output.view(length * size)
                if is_stored:
                    self._raw(expr, begin, data)
                else:
                    target = self._output.tensor(torch_dtype(dtype), length)
                    self._fill_output(expr, torch_dtype(working), whole, begin, target)
                    self.settle()
                yield begin, data

    def _fill_output(
        self, expr: Expr, working: torch.dtype, whole: Whole, start: int, out: Tensor
    ) -> None:
        if self._stream is None:
            self.fill(expr, working, whole, start, out)
            return
        result = self._take(working, out.numel())
        self.fill(expr, working, whole, start, result)
        out.copy_(result)  # rounded on the GPU

    def _stored(self, expr: Expr) -> DType | None:
        """Return the dtype of `expr` on disk if its bytes lie there as they are."""
        while isinstance(expr, (Same, Rows, Shaped)):
            expr = inputs(expr)[0]
        if isinstance(expr, Read):
            return self.plan.sources[expr.source].specs()[expr.name].dtype
        return None

    def _raw(self, expr: Expr, start: int, out: memoryview) -> None:
        """Fill `out` with bytes on disk from element `start` on; inputs of a Same must agree."""
        if isinstance(expr, Read):
            source = self.plan.sources[expr.source]
            source.read(expr.name, start * source.specs()[expr.name].dtype.itemsize, out)
            return
        if isinstance(expr, Rows):
            self._raw(expr.whole, start + self._before(expr), out)
            return
        if isinstance(expr, Shaped):
            self._raw(expr.input, start, out)
            return
        assert isinstance(expr, Same)
        first, *others = expr.inputs
        self._raw(first, start, out)
        for other in others:
            theirs = bytearray(len(out))
            self._raw(other, start, memoryview(theirs))
            if theirs != out:
                raise ValueError("it differs between the models, and integers cannot be merged")

    def _before(self, node: Rows) -> int:
        """Return the number of elements of the whole before those of `node`."""
        return node.first * prod(self.plan.shape(node)[1:])

    def scan(
        self, node: Merge, scan: Scan, working: DType, whole: Whole, start: int, count: int
    ) -> Any:
        """Return what `scan` finds in chunk [start, start + count) of the inputs of `node`."""
        self.begin(node, start + count)
        merging, found = self._known(node, torch_dtype(working)), []
        with self._arithmetic():
            for begin, length in self.slices(node, merging.working, start, count):
                mark = self._used
                tensors = self._inputs(node, merging, whole, begin, length)
                found.append(scan.look(tensors, Place(merging.shape, begin)))
                self._used = mark
            return scan.join(found)

    def sample(
        self, node: Merge, scan: Scan, working: DType, runs: Sequence[tuple[int, int]]
    ) -> Any:
        """Return what `scan` finds in all `runs` together of the inputs of `node`, which are reads.

        One look at many short runs: their elements lie one after the other, at no place.
        """
        self.begin(node)
        count, kind = sum(length for _, length in runs), torch_dtype(working)
        merging, mark = self._known(node, kind), self._used
        tensors = torch.empty(
            len(node.inputs), count, dtype=torch.bfloat16 if merging.as_stored else kind
        )
        with self._arithmetic():
            for row, expr in zip(tensors, node.inputs, strict=True):
                assert isinstance(expr, Read)
                dtype = self.plan.sources[expr.source].specs()[expr.name].dtype
                raw, size = self._room(count * dtype.itemsize), dtype.itemsize
                places = ((start * size, length * size) for start, length in runs)
                self._reader.gather(expr, places, raw.view(count * size))
                row.copy_(raw.tensor(torch_dtype(dtype), count))
                self._used = mark
            place = Place(merging.shape, 0)
            return scan.join([scan.look(tensors.to(self.device), place)])

    def _take(self, dtype: torch.dtype, count: int) -> Tensor:
        """Return memory for `count` elements, in use until it is released."""
        if self.device.type != "cpu":
            return torch.empty(count, dtype=dtype, device=self.device)
        return self._room(count * dtype.itemsize).tensor(dtype, count)

    def _room(self, nbytes: int) -> Buffer:
        """Return memory for `nbytes`, in use until it is released."""
        if self._used == len(self._pool):
            self._pool.append(Buffer(nbytes))
        elif self._pool[self._used].size < nbytes:
            self._pool[self._used] = Buffer(nbytes)
        self._used += 1
        return self._pool[self._used - 1]

    def _inputs(
        self, node: Merge, merging: _Merging, whole: Whole, start: int, count: int
    ) -> Tensor:
        """Return elements [start, start + count) of each input of `node`, [inputs, count]."""
        exprs, working = node.inputs, merging.working
        if merging.as_stored:
            buffer = self._room(len(exprs) * count * 2)
            for i, expr in enumerate(exprs):
                assert isinstance(expr, Read)
                data = buffer.view(count * 2, i * count * 2)
                self._reader.gather(expr, ((start * 2, count * 2),), data)
            return buffer.tensor(torch.bfloat16, len(exprs) * count).view(len(exprs), count)
        # Rows a power of two apart would share the same few lines of the cache; kernels, which
        # want them one after the other, look at little of each at a time.
        stride = count + (0 if kernels.loaded() or self._stream is not None else PADDING)
        tensors = self._take(working, len(exprs) * stride).view(len(exprs), stride)[:, :count]
        for row, expr in zip(tensors, exprs, strict=True):
            self.fill(expr, working, whole, start, row)
        return tensors

    def _known(self, node: Merge, working: torch.dtype) -> _Merging:
        """Return what does not change until `begin` is called."""
        if (found := self._merging.get(id(node))) is not None:
            return found
        method, params = methods.load(node.method), dict(node.params)
        compiled = kernels.loaded() and self.device.type == "cpu" and working == torch.float32
        stored = BY_NAME["bfloat16"]
        are_stored = all(isinstance(e, Read) and self._stored(e) == stored for e in node.inputs)
        found = _Merging(
            *(method, params, self.plan.shape(node), method.rows(params), working),
            as_stored=compiled and bool(method.kernels) and are_stored,
        )
        self._merging[id(node)] = found
        return found

    def fill(self, expr: Expr, working: torch.dtype, whole: Whole, start: int, out: Tensor) -> None:
        """Put elements of `expr` from `start` on into `out`, computed in dtype `working`."""
        count = out.numel()
        mark = self._used
        if isinstance(expr, Read):
            self._read(expr, start, out)
        elif isinstance(expr, Fill):
            out.fill_(expr.value)
        elif isinstance(expr, Merge):
            self._merge(expr, working, whole, start, out)
        elif isinstance(expr, Rows):
            self.fill(expr.whole, working, whole, start + self._before(expr), out)
        elif isinstance(expr, Shaped):
            self.fill(expr.input, working, whole, start, out)
        elif isinstance(expr, (Affine, Noise)):
            value = out if out.dtype == working else self._take(working, count)
            self.fill(expr.input, working, whole, start, value)
            if isinstance(expr, Noise):
                noise.add(value, expr.scale, expr.key, start)
            else:
                value.mul_(expr.scale)
                if expr.shift:  # adding zero would take the sign from zeros
                    value.add_(expr.shift)
            if value is not out:
                out.copy_(value)
        elif isinstance(expr, Columns):
            reshape.side_by_side(self, expr, working, whole, start, out)
        elif isinstance(expr, Transpose):
            reshape.transposed(self, expr, working, whole, start, out)
        else:
            assert not isinstance(expr, (Concat, Same)), "handled before anything is computed"
            out.copy_(rows.evaluate(self, expr, working, whole, start, count))
        self._used = mark

    def _merge(
        self, node: Merge, working: torch.dtype, whole: Whole, start: int, out: Tensor
    ) -> None:
        merging = self._known(node, working)
        method, params, place = merging.method, merging.params, Place(merging.shape, start, out)
        lead, count = 0, out.numel()
        if merging.by_rows:  # some of a vector's elements may be wanted: its rows
            lead = start % place.row
            count = -(-(lead + count) // place.row) * place.row
            place = Place(place.shape, start - lead, out if count == out.numel() else None)
        tensors = self._inputs(node, merging, whole, place.start, count)
        merged = method.merge(tensors, params, whole.stats.get(id(node)), place)
        if merged is not out:
            out.copy_(merged[lead : lead + out.numel()])

    def _read(self, node: Read, start: int, out: Tensor) -> None:
        stored = self._reader.read(node, start, out.numel())
        if self._stream is not None:
            # As stored, while the next input is read; the GPU widens it.
            stored = stored.to(self.device, non_blocking=True)
            self._reader.lend(node)
        out.copy_(stored)

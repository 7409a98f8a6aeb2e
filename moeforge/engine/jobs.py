"""Owns dividing a plan into jobs: copies of byte ranges, and tensors computed in phases.

A tensor whose methods need statistics is measured first, level by level of its expression, and
written when the last measurement is in; each phase is divided into chunks that any worker may take.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from moeforge import methods
from moeforge.engine.writer import OutputFiles
from moeforge.output.layout import Shard
from moeforge.plans import Expr, Merge, Plan, inputs, pieces
from moeforge.sources import FileSpan
from moeforge.tensors import DType

if TYPE_CHECKING:
    from moeforge.engine.evaluate import Evaluator

CHUNK = 2**22
"""Elements per unit of work: a multiple of every slice size, so that slices fall the same way."""
COPY_CHUNK = 2**26
"""Bytes per call of copy_file_range: short enough for progress and Ctrl-C."""

Report = Callable[[int], None]


class Sink(Protocol):
    """Where computed bytes go."""

    def write(self, shard: str, data: memoryview, offset: int) -> None:
        """Put `data` at byte `offset` of `shard`."""


class Job(Protocol):
    """Something to do for one output tensor."""

    name: str

    def chunks(self) -> Iterator[Callable[[Evaluator | None, Report], None]]:
        """Yield the parts of the present phase; they may run in any order, at the same time."""

    def advance(self) -> bool:
        """Go to the next phase, when all chunks of this one are done; False if there is none."""


@dataclass
class CopyJob:
    """Bytes of an input file that go into an output file as they are."""

    name: str
    span: FileSpan
    shard: str
    offset: int
    files: OutputFiles

    def chunks(self) -> Iterator[Callable[[Evaluator | None, Report], None]]:
        """Yield one copy: threads are better used on different tensors."""
        yield lambda _, report: self._copy(report)

    def advance(self) -> bool:
        """There is one phase."""
        return False

    def _copy(self, report: Report) -> None:
        target = self.files.descriptor(self.shard)
        source = os.open(self.span.path, os.O_RDONLY)
        try:
            done = 0
            while done < self.span.nbytes:
                count = copy_range(
                    source,
                    target,
                    min(COPY_CHUNK, self.span.nbytes - done),
                    self.span.offset + done,
                    self.offset + done,
                )
                if not count:
                    raise OSError(f"{self.span.path} ended early")
                done += count
                report(count)
        finally:
            os.close(source)


_NO_KERNEL_COPY = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


def copy_range(source: int, target: int, count: int, start: int, to: int) -> int:
    """Copy up to `count` bytes between descriptors, in the kernel where it can; return how many."""
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, target, count, start, to)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
    data = os.pread(source, min(count, 2**20), start)
    return os.pwrite(target, data, to) if data else 0


@dataclass
class MergeJob:
    """A tensor, or a piece of one, that is computed.

    Attributes:
        name: output tensor.
        expr: what to compute.
        numel: number of elements.
        dtype: dtype on disk.
        offset: byte in file `shard` where the piece begins.
        stats: whole-tensor sums of measured expressions, by id of the expression.
    """

    name: str
    expr: Expr
    numel: int
    dtype: DType
    working: DType
    shard: str
    offset: int
    files: Sink
    stats: dict[int, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._levels = measured_levels(self.expr)
        self._partial: dict[int, list[tuple[float, ...]]] = {}

    def chunks(self) -> Iterator[Callable[[Evaluator | None, Report], None]]:
        """Yield the chunks of a measurement, or, when all are taken, of the result."""
        for start in range(0, max(self.numel, 1), CHUNK):
            count = min(CHUNK, self.numel - start)
            if self._levels:
                yield lambda worker, _, s=start, n=count: self._measure(worker, s, n)  # type: ignore[misc]
            else:
                yield lambda worker, report, s=start, n=count: self._write(worker, s, n, report)  # type: ignore[misc]

    def advance(self) -> bool:
        """Add up what was measured and go on to the next level, or to writing."""
        if not self._levels:
            return False
        for node in self._levels.pop(0):
            # fsum is exact, so the order in which chunks came in does not matter.
            self.stats[id(node)] = tuple(map(math.fsum, zip(*self._partial[id(node)], strict=True)))
        self._partial.clear()
        return True

    def _measure(self, worker: Evaluator, start: int, count: int) -> None:
        for node in self._levels[0]:
            sums = worker.measure(node, self.working, self.stats, start, count)
            self._partial.setdefault(id(node), []).extend(sums)

    def _write(self, worker: Evaluator, start: int, count: int, report: Report) -> None:
        size = self.dtype.itemsize
        for begin, data in worker.produce(
            self.expr, self.working, self.dtype, self.stats, start, count
        ):
            self.files.write(self.shard, data, self.offset + begin * size)
            report(len(data))


def measured_levels(expr: Expr) -> list[list[Merge]]:
    """Return the expressions whose method measures, innermost first, by level of nesting."""
    levels: list[list[Merge]] = []

    def visit(node: Expr) -> int:
        depth = max((visit(child) for child in inputs(node)), default=0)
        if isinstance(node, Merge) and methods.load(node.method).measure:
            while len(levels) <= depth:
                levels.append([])
            levels[depth].append(node)
            return depth + 1
        return depth

    visit(expr)
    return levels


def jobs_of(plan: Plan, shards: tuple[Shard, ...], files: OutputFiles) -> list[CopyJob | MergeJob]:
    """Return the jobs of `plan` in the order of the output."""
    jobs: list[CopyJob | MergeJob] = []
    for shard in shards:
        for entry in shard.entries:
            offset = entry.offset
            for expr, spec in pieces(entry.tensor):
                span = None
                if plan.is_copy(expr, spec.dtype):
                    span = plan.sources[expr.source].locate(expr.name)  # type: ignore[union-attr]
                if span:
                    jobs.append(CopyJob(entry.tensor.name, span, shard.name, offset, files))
                else:
                    jobs.append(
                        MergeJob(
                            entry.tensor.name,
                            expr,
                            spec.numel,
                            spec.dtype,
                            plan.working_dtype(expr),
                            shard.name,
                            offset,
                            files,
                        )
                    )
                offset += spec.nbytes
    return jobs

"""Owns the jobs that a plan comes to: copies of byte ranges, and tensors computed in phases.

A tensor whose methods must know something of it as a whole is scanned first, level by level of its
expression, and written when that is known; each phase is divided into chunks that any worker may
take.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moeforge import methods
from moeforge.engine.failures import OddValues, short, whence
from moeforge.engine.runs import measured_levels, sample_runs
from moeforge.engine.slices import chunks, needs_rows
from moeforge.methods import RUN, Measurement, Place, Scan
from moeforge.output.layout import Shard
from moeforge.plans import Expr, Merge, Plan, Read, pieces, walk
from moeforge.sources import FileSpan, lies
from moeforge.system import open_file, read_at
from moeforge.tensors import DType, TensorSpec

if TYPE_CHECKING:
    from moeforge.engine.evaluate import Evaluator
    from moeforge.engine.rows import Whole

COPY_WINDOW = 2**20
"""Bytes copied at a time: they stay in the cache while they are looked at, and written. With less,
threads spend their time handing Python's lock over."""

SAMPLE, COARSE = 2**16, 32
"""Elements of a sample; and the runs that it is made of where runs cannot be short."""

_LITTLE = 100
"""Where of so many bytes at most one is computed with, it is copying that takes the time."""

Report = Callable[[int], None]
Ready = Callable[[Report], None]
"""Returns when inputs are there; calls what it is given now and then, which may raise."""


def at_once(report: Report) -> None:
    """Wait for nothing."""


class Sink(Protocol):
    """Where computed bytes go."""

    def write(self, shard: str, data: memoryview, offset: int) -> None:
        """Put `data` at byte `offset` of `shard`."""


class Job(Protocol):
    """Something to do for one output tensor."""

    name: str

    @property
    def size(self) -> int:
        """How much work it is, in bytes read, about."""

    def describe(self) -> str:
        """Say what it is made of, for messages."""

    def chunks(self) -> Iterator[Callable[[Evaluator | None, Report], None]]:
        """Yield the parts of the present phase; they may run in any order, at the same time."""

    def advance(self) -> bool:
        """Go to the next phase, when all chunks of this one are done; False if there is none."""


@dataclass
class CopyJob:
    """Bytes of an input file that go into an output file as they are.

    Attributes:
        name: output tensor.
        origin: tensor that they are of.
        span: where they lie.
        dtype: dtype on disk.
        shard: file that they go to.
        offset: byte in it where they begin.
        files: where the bytes go.
        ready: returns when the input is there.
    """

    name: str
    origin: Read
    span: FileSpan
    dtype: DType
    shard: str
    offset: int
    files: Sink
    ready: Ready = at_once

    def reads(self) -> Iterator[Read]:
        """Yield the tensor that they are of."""
        yield self.origin

    @property
    def size(self) -> int:
        """Bytes to copy."""
        return self.span.nbytes

    def describe(self) -> str:
        """Say what it is."""
        return f"copied from {self.origin.name} in {self.span.path}"

    def chunks(self) -> Iterator[Callable[[Evaluator | None, Report], None]]:
        """Yield one copy: threads are better used on different tensors."""
        yield lambda _, report: self._copy(report)

    def advance(self) -> bool:
        """There is one phase."""
        return False

    def _copy(self, report: Report) -> None:
        self.ready(report)
        odd, buffer = OddValues(self.dtype), memoryview(bytearray(COPY_WINDOW))
        source = open_file(self.span.path, os.O_RDONLY)
        try:
            for done in range(0, self.span.nbytes, COPY_WINDOW):
                data = buffer[: self.span.nbytes - done]
                read_all(source, data, self.span.offset + done, self.span.path)
                odd.look(data)
                self.files.write(self.shard, data, self.offset + done)
                report(len(data))
        finally:
            os.close(source)
        odd.refuse(self.name, lambda: f"it is {self.describe()}, which has them")


def read_all(source: int, out: memoryview, start: int, path: Path) -> None:
    """Fill `out` from byte `start` of a file on, however little comes at a time.

    Raises:
        OSError: it cannot be read, or ends before.
    """
    done = 0
    while done < len(out):
        count = read_at(source, out[done:], start + done)
        if not count:
            raise OSError(f"{path} ended early")
        done += count


@dataclass
class _Scanning:
    """A measurement that waits for the results of its scan, by number of the chunk."""

    node: Merge
    measurement: Measurement
    scan: Scan
    found: dict[int, Any] = field(default_factory=dict)


@dataclass
class MergeJob:
    """A tensor, or a piece of one, that is computed.

    Attributes:
        name: output tensor.
        expr: what to compute.
        numel: number of elements.
        dtype: dtype on disk.
        plan: holds the sources.
        shard: file that the piece lies in.
        offset: byte in it where the piece begins.
        files: where the bytes go.
        odd: counts what is not finite; None where that does not matter.
        ready: returns when all inputs are there.
    """

    name: str
    expr: Expr
    numel: int
    dtype: DType
    plan: Plan
    shard: str
    offset: int
    files: Sink
    odd: OddValues | None = None
    ready: Ready = at_once

    def reads(self) -> Iterator[Read]:
        """Yield every tensor that it is made of."""
        return (part for part in walk(self.expr) if isinstance(part, Read))

    def __post_init__(self) -> None:
        self._levels = measured_levels(self.expr)
        self._running: list[_Scanning] = []
        self._working = self.plan.working_dtype(self.expr, self.dtype)
        self._made: Whole | None = None
        self._next_level()

    @property
    def size(self) -> int:
        """Elements of all inputs."""
        return self.numel * sum(isinstance(part, Read) for part in walk(self.expr))

    def describe(self) -> str:
        """Say what it is computed from."""
        return short(self.plan, self.expr)

    @property
    def _whole(self) -> Whole:
        from moeforge.engine.rows import Whole

        if self._made is None:
            self._made = Whole()
        return self._made

    def chunks(self) -> Iterator[Callable[[Evaluator | None, Report], None]]:
        """Yield the chunks of the scans, or, when all is known, of the result."""
        if not self._running:
            for start, count in chunks(self.plan, self.expr, self.numel):
                yield lambda worker, report, s=start, n=count: self._write(worker, s, n, report)  # type: ignore[misc]
            return
        for job in self._running:
            if job.scan.sample and self._are_reads(job.node):
                numel = self._place(job.node).numel
                runs = sample_runs(numel, RUN, min(SAMPLE, numel // 64) // RUN)
                yield lambda worker, report, j=job, r=runs: self._sample(worker, j, r, report)  # type: ignore[misc]
                continue
            ranges = job.scan.runs or chunks(self.plan, job.node, self._place(job.node).numel)
            if job.scan.sample:
                row = self._place(job.node).row if needs_rows(job.node) else 1
                length = -(-SAMPLE // COARSE // row) * row
                ranges = sample_runs(self._place(job.node).numel, length, COARSE, row)
            for number, (start, count) in enumerate(ranges):
                yield lambda worker, report, j=job, i=number, s=start, n=count: self._scan(  # type: ignore[misc]
                    worker, j, i, s, n, report
                )

    def advance(self) -> bool:
        """Hand what was found to the measurements; go on to the next scans, or to writing."""
        if not self._running:
            if self._made is not None:
                self._made.clear()
            if self.odd is not None:
                self.odd.refuse(self.name, lambda: whence(self.plan, self.expr, self.dtype))
            return False
        before, self._running = self._running, []
        for job in before:
            chunks = [job.found[number] for number in range(len(job.found))]
            self._resume(job.node, job.measurement, chunks)
        if not self._running:
            self._next_level()
        return True

    def _next_level(self) -> None:
        """Begin the measurements of the innermost expressions that have none yet."""
        while self._levels and not self._running:
            for node in self._levels.pop(0):
                measure = methods.load(node.method).measure
                assert measure is not None
                self._resume(node, measure(dict(node.params), self._place(node)), None)

    def _resume(self, node: Merge, measurement: Measurement, found: list[Any] | None) -> None:
        try:
            scan = next(measurement) if found is None else measurement.send(found)
            self._running.append(_Scanning(node, measurement, scan))
        except StopIteration as end:
            self._whole.stats[id(node)] = end.value

    def _place(self, node: Expr) -> Place:
        return Place(self.plan.shape(node), 0)

    def _are_reads(self, node: Merge) -> bool:
        """Say whether any elements of the inputs can be looked at out of their place."""
        return all(isinstance(i, Read) for i in node.inputs) and not needs_rows(node)

    def _sample(
        self,
        worker: Evaluator,
        job: _Scanning,
        runs: Sequence[tuple[int, int]],
        report: Report,
    ) -> None:
        self.ready(report)
        job.found[0] = worker.sample(job.node, job.scan, self._working, runs)

    def _scan(
        self,
        worker: Evaluator,
        job: _Scanning,
        number: int,
        start: int,
        count: int,
        report: Report,
    ) -> None:
        self.ready(report)

        def scan() -> Any:
            return worker.scan(job.node, job.scan, self._working, self._whole, start, count)

        job.found[number] = self._with_room(worker, job.node, count, scan)

    def _write(self, worker: Evaluator, start: int, count: int, report: Report) -> None:
        self.ready(report)
        size, end = self.dtype.itemsize, start + count

        def write() -> None:
            nonlocal start
            for begin, data in worker.produce(
                self.expr, self._working, self.dtype, self._whole, start, end - start
            ):
                if self.odd is not None:
                    self.odd.look(data)
                self.files.write(self.shard, data, self.offset + begin * size)
                report(len(data))
                start = begin + len(data) // size

        self._with_room(worker, self.expr, count, write)

    def _with_room(self, worker: Evaluator, expr: Expr, count: int, act: Callable[[], Any]) -> Any:
        """Do `act`, for `count` elements of `expr`, again where a device's memory is not enough."""
        from torch.cuda import OutOfMemoryError

        while True:
            try:
                return act()
            except OutOfMemoryError:
                worker.release()
                if not (done := worker.shrink(expr, count)):
                    raise
                warnings.warn(f"{self.name}: {done}", stacklevel=2)


def _span(plan: Plan, expr: Expr, spec: TensorSpec) -> tuple[Read, FileSpan] | None:
    """Return whose bytes `expr` stored as `spec` are, and where they lie, if a file has them."""
    found = plan.origin(expr)
    if found is None or not plan.is_copy(expr, spec.dtype):
        return None
    read, start = found
    whole = lies(plan.sources[read.source], read.name)
    if whole is None:
        return None
    at = whole.offset + start * spec.dtype.itemsize
    return read, FileSpan(whole.path, at, spec.nbytes)


def are_copies(jobs: Sequence[CopyJob | MergeJob]) -> bool:
    """Say whether nothing is computed by any of `jobs`."""
    return all(isinstance(job, CopyJob) for job in jobs)


def are_mostly_copies(jobs: Sequence[CopyJob | MergeJob]) -> bool:
    """Say whether what is computed is next to nothing: the routers of a mixture, say."""
    computed = sum(job.size for job in jobs if isinstance(job, MergeJob))
    return _LITTLE * computed <= sum(job.size for job in jobs)


def jobs_of(plan: Plan, shards: Sequence[Shard], files: Sink) -> list[CopyJob | MergeJob]:
    """Return the jobs of `plan` in the order of the output."""
    jobs: list[CopyJob | MergeJob] = []
    for shard in shards:
        for entry in shard.entries:
            offset = entry.offset
            for expr, spec in pieces(entry.tensor):
                name, found = entry.tensor.name, _span(plan, expr, spec)
                if found:
                    jobs.append(CopyJob(name, *found, spec.dtype, shard.name, offset, files))
                else:
                    jobs.append(
                        MergeJob(
                            *(name, expr, spec.numel, spec.dtype, plan, shard.name, offset),
                            files,
                            OddValues(spec.dtype),
                        )
                    )
                offset += spec.nbytes
    return jobs

"""Owns making the bytes of a plan: in slices, by several threads, each byte written once.

Which tensors there are and where they go is decided before; the engine is a loop. The result does
not depend on slice size, number of threads or the order in which work is taken.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from moeforge import kernels, methods
from moeforge import workers as threads
from moeforge.engine import processes
from moeforge.engine.fetch import Fetcher
from moeforge.engine.jobs import CopyJob, MergeJob, are_copies, are_mostly_copies, jobs_of
from moeforge.engine.pool import Pool
from moeforge.engine.seal import Sealer
from moeforge.engine.writer import OutputFiles
from moeforge.methods import BLOCK, CHUNK, HELD
from moeforge.output.layout import Shard
from moeforge.plans import (
    Affine,
    Expr,
    Fill,
    Lora,
    Merge,
    Noise,
    Plan,
    Read,
    Rows,
    Same,
    Shaped,
    Transpose,
    inputs,
    pieces,
    walk,
)
from moeforge.sealed import Sealed
from moeforge.system import allow_files, cores

MIN_SLICE, DEFAULT_SLICE = 2**16, 2**18
"""Elements per slice; the default is the fastest measured: see docs/performance.md."""
GPU_SLICE = 2**22
"""The default on a GPU, where starting an operation takes longer than doing it on a smaller one."""

WINDOW = 2**18
"""Bytes of an input tensor that a worker reads at a time."""
BAND = 2**22
"""Elements of a transposed matrix that a worker holds, or a row of it where that is more."""
GPU_WORKERS = 8
"""Threads that keep GPUs at work, at most: more of them wait for Python; docs/performance.md."""
INTERPRETER = 280_000_000
"""Bytes that Python and torch take before any work, measured; see docs/performance.md."""
COMPILER = 130_000_000
"""Bytes that numba takes where compiled arithmetic is loaded, measured."""
CONTEXT = 500_000_000
"""Bytes that a GPU takes for itself in a process that uses it."""
CUDA_INTERPRETER = 760_000_000
"""Bytes that Python and torch take with CUDA, what it holds on the host included, measured."""
COPY_INTERPRETER = 60_000_000
"""Bytes that Python takes where everything is copied and torch is never imported."""
COPYING = 3 * 2**20
"""Bytes that each worker takes then: what it copies at a time, the look at it, and the hash's."""
PER_TENSOR = 1300
"""Bytes that the plan takes for each tensor that is read or written; see docs/scale.md."""


@dataclass(frozen=True)
class Settings:
    """How fast, never which bytes.

    Attributes:
        threads: workers; None for one per usable core.
        slice_elements: elements per slice, a multiple of MIN_SLICE; None to choose.
        memory: bytes that the process may take; None for no limit.
        device: torch device of the arithmetic.
        evict: remove files of the Hub's cache that this process has brought when they are used up.
        local: number of this process among those of its launch on this machine, and how many they
            are: they share its cores and GPUs.
    """

    threads: int | None = None
    slice_elements: int | None = None
    memory: int | None = None
    device: str = "cpu"
    evict: bool = False
    local: tuple[int, int] = (0, 1)

    @property
    def workers(self) -> int:
        """Number of workers."""
        most = max(1, cores() // self.local[1])
        return self.threads or (most if self.device == "cpu" else min(most, GPU_WORKERS))

    @property
    def devices(self) -> list[str]:
        """Devices for torch: of "cuda" without a number, this process's share of all GPUs."""
        if self.device != "cuda":
            return [self.device]
        import torch

        count, (number, sharing) = torch.cuda.device_count(), self.local
        if not count:
            return [self.device]  # torch says why when it is used
        return [f"cuda:{n}" for n in range(number % count, count, sharing)]

    def slice_for(self, plan: Plan) -> int:
        """Return elements per slice for `plan`: the default, or less where memory is short."""
        if self.slice_elements:
            return self.slice_elements
        size = DEFAULT_SLICE if self.device == "cpu" else GPU_SLICE
        while self.memory and size > MIN_SLICE and peak_memory(plan, self, size) > self.memory:
            size //= 2
        return size


def buffers_needed(plan: Plan) -> tuple[int, int, int]:
    """Return the most that any output tensor needs: slice buffers, input tensors, band bytes."""
    parts = [expr for tensor in plan.tensors for expr, _ in pieces(tensor)]
    reads = (sum(isinstance(part, Read) for part in walk(expr)) for expr in parts)
    bands = (_band_bytes(plan, expr) for expr in parts)
    return max(map(_held, parts), default=0), max(reads, default=0), max(bands, default=0)


def _held(expr: Expr) -> int:
    """Return the slices that are held while one of `expr` is made, that one apart."""
    below = max(map(_held, inputs(expr)), default=0)
    if isinstance(expr, (Affine, Noise)):
        return below + 1
    if isinstance(expr, (Read, Fill, Same, Rows, Shaped, Transpose)):
        return below
    # While one input is computed, there is room for the results of all; at least two of them.
    return below + max(2, len(inputs(expr)))


def _band_bytes(plan: Plan, expr: Expr) -> int:
    """Return the bytes of the bands of all transposed matrices in `expr`, at 8 per element."""
    shapes = [plan.shape(part) for part in walk(expr) if isinstance(part, Transpose)]
    # A band, and the group of rows of the input that is being spread over it.
    return sum(
        8 * (min(rows * columns, max(BAND, columns)) + max(BLOCK, rows)) for rows, columns in shapes
    )


def is_copy_only(plan: Plan) -> bool:
    """Say whether all bytes of `plan` are copied, so that torch is not needed."""
    return plan.bytes_copied == plan.nbytes


def kernels_of(plan: Plan, settings: Settings) -> set[str]:
    """Return the files of kernels that computing `plan` gains from; empty where that is too little.

    As if nothing of it were there yet.
    """
    elements: dict[str, int] = dict.fromkeys(kernels.WORTH, 0)
    for tensor in plan.tensors if settings.device == "cpu" else ():
        parts = list(walk(tensor.expr))
        merges = (methods.load(part.method) for part in parts if isinstance(part, Merge))
        read = tensor.spec.numel * sum(isinstance(part, Read) for part in parts)
        for name in {name for method in merges for name in method.kernels}:
            elements[name] += read
    shares = {name: count // settings.workers for name, count in elements.items()}
    worth = any(shares[name] >= least for name, least in kernels.WORTH.items())
    return {name for name, count in elements.items() if count and worth}


def peak_memory(plan: Plan, settings: Settings, slice_elements: int | None = None) -> int:
    """Return an estimate of the engine's peak memory in bytes, the interpreter included.

    Where a GPU computes: of the host's. See `gpu_memory` for its own.
    """
    read = sum(len(source.specs()) for source in plan.sources.values())
    planned = PER_TENSOR * (len(plan.tensors) + read)
    if is_copy_only(plan):
        return COPY_INTERPRETER + planned + settings.workers * COPYING
    size = slice_elements or settings.slice_for(plan)
    buffers, reads, bands = buffers_needed(plan)
    parts = (part for tensor in plan.tensors for part in walk(tensor.expr))
    merges = (methods.load(part.method) for part in parts if isinstance(part, Merge))
    choices = HELD // 8 if any(method.random for method in merges) else 0
    if settings.device.startswith("cuda"):
        # A slice of each input as it is stored, and one of the output: what is copied to and from.
        return CUDA_INTERPRETER + planned + settings.workers * (4 * reads + 8) * size
    # Results in 8 bytes per element at most, as many temporaries of a method, one raw output; and
    # of each input what is read at a time.
    per_worker = (2 * max(buffers, 1) + 2) * 8 * size + reads * WINDOW + bands + choices
    compiler = COMPILER if kernels_of(plan, settings) else 0
    return INTERPRETER + compiler + planned + settings.workers * per_worker


def gpu_memory(plan: Plan, settings: Settings) -> int:
    """Return an estimate of the most memory that is taken on the GPUs together, in bytes."""
    if is_copy_only(plan):
        return 0
    buffers, _, bands = buffers_needed(plan)
    slices = (2 * max(buffers, 1) + 2) * 8 * settings.slice_for(plan)
    contexts = min(len(settings.devices), settings.workers)
    return contexts * CONTEXT + settings.workers * (slices + bands)


def run(
    plan: Plan,
    shards: tuple[Shard, ...],
    folder: Path,
    settings: Settings,
    progress: Callable[[int], None] = lambda done: None,
    kept: Mapping[str, Sealed] | None = None,
    sealed: Callable[[str, Sealed], None] = lambda name, seal: None,
    came: Callable[[int, int], None] = lambda done, total: None,
    compiling: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Sealed]:
    """Write the shards of `plan` into `folder`, and see them onto the disk.

    Args:
        plan: what to make; its router source must exist.
        shards: names and offsets of everything, from `output.layout`.
        folder: an existing folder.
        settings: how.
        progress: called now and then, by this thread, with the bytes written so far.
        kept: shards that are finished already and are left alone.
        sealed: told each other shard as soon as it is finished, by some thread.
        came: told, by some thread, of the bytes that have come from the Hub, and of all that will.
        compiling: told where arithmetic is compiled for the first time; see `kernels.load`.

    Returns:
        What is known of every shard, by name.

    Raises:
        BuildError: reading, computing or writing failed, or a value is not finite; says which
            tensor.
    """
    allow_files()
    had = dict(kept or {})
    wanted = tuple(shard for shard in shards if shard.name not in had)
    had_bytes = sum(e.tensor.spec.nbytes for s in shards if s.name in had for e in s.entries)
    with OutputFiles(folder, wanted) as files:
        jobs = jobs_of(plan, wanted, files)
        with (
            Sealer(folder, wanted, jobs, settings.workers, sealed) as sealer,
            Fetcher(
                plan, _order(plan, jobs, settings), evict=settings.evict, progress=came
            ) as fetcher,
        ):

            def told(done: int) -> None:
                sealer.check()
                fetcher.check()
                progress(had_bytes + done)

            def begun() -> None:
                sealer.start()
                fetcher.start()

            def complete(job: CopyJob | MergeJob) -> None:
                fetcher.complete(job)  # before the other, which may wait: used-up files go at once
                sealer.complete(job)

            _do(plan, jobs, settings, told, begun, complete, compiling)
            total = sum(e.tensor.spec.nbytes for s in wanted for e in s.entries)
            return {**had, **sealer.finish(lambda: told(total))}


def _workers(plan: Plan, jobs: list[CopyJob | MergeJob], settings: Settings) -> tuple[int, bool]:
    """Return how many workers there will be, and whether they are processes of their own."""
    if are_mostly_copies(jobs):
        return settings.workers, False
    elements = sum(job.size for job in jobs)
    workers = min(settings.workers, len(jobs), -(-elements // CHUNK))
    forks = processes.AVAILABLE and not (threads.multiplied and multiplies(plan))
    return workers, workers > 1 and settings.device == "cpu" and forks


def _order(
    plan: Plan, jobs: list[CopyJob | MergeJob], settings: Settings
) -> list[CopyJob | MergeJob]:
    """Return `jobs` in the order in which they are taken."""
    workers, forks = _workers(plan, jobs, settings)
    return [jobs[number] for number in processes.order_of(jobs, workers)] if forks else jobs


def _do(
    plan: Plan,
    jobs: list[CopyJob | MergeJob],
    settings: Settings,
    progress: Callable[[int], None],
    begun: Callable[[], None],
    complete: Callable[[Any], None],
    compiling: Callable[[int, int], None],
) -> None:
    """Do all `jobs`, by threads or processes.

    Args:
        plan: what they are of.
        jobs: all of them.
        settings: how.
        progress: told the bytes written.
        begun: called when worker processes are forked, or before threads begin.
        complete: told each job that is done.
        compiling: told where arithmetic is compiled.
    """
    workers, forks = _workers(plan, jobs, settings)
    if are_copies(jobs):
        begun()
        Pool(workers, progress, complete).run(jobs, lambda: None)
        return
    import torch

    from moeforge.engine.evaluate import Evaluator

    size = settings.slice_for(plan)
    if names := kernels_of(plan, settings):
        specs = (spec for source in plan.sources.values() for spec in source.specs().values())
        narrow = any(spec.dtype.name == "bfloat16" for spec in specs)
        kernels.load(names, narrow=narrow, compiling=compiling)

    places = cycle(settings.devices)

    def make_state() -> Evaluator:
        return Evaluator(plan, size, next(places))

    if forks:
        processes.run(jobs, make_state, workers, progress, begun, complete)
        return
    threads.multiplied = threads.multiplied or (workers > 1 and multiplies(plan))
    before = torch.get_num_threads()
    try:
        begun()
        Pool(workers, progress, complete).run(jobs, make_state)
    finally:
        torch.set_num_threads(before)  # a worker takes one thread for itself


def multiplies(plan: Plan) -> bool:
    """Say whether matrices are multiplied for any tensor of `plan`."""
    return any(
        isinstance(part, Lora) or (isinstance(part, Merge) and methods.load(part.method).multiplies)
        for tensor in plan.tensors
        for part in walk(tensor.expr)
    )


def free_space(folder: Path) -> int:
    """Return the free bytes on the disk that holds `folder` or its nearest existing parent."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


__all__ = ["CopyJob", "MergeJob", "Settings", "free_space", "is_copy_only", "peak_memory", "run"]

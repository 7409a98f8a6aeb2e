"""Times the arithmetic of merge methods alone: one tensor, one process, CPU time.

    python benchmarks/arithmetic.py [METHOD ...]

Inputs are files in bfloat16 whose pages are in memory, the output is memory; values are looked at,
nothing is hashed or synced. Prints, as Markdown, the best of five by torch's operations and by
compiled ones, and fails where their bytes differ.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from moeforge import kernels, methods
from moeforge.engine import DEFAULT_SLICE
from moeforge.engine.evaluate import Evaluator
from moeforge.engine.jobs import jobs_of
from moeforge.output.layout import lay_out
from moeforge.plans import Merge, Plan, PlannedTensor, Read
from moeforge.sources.memory import MemorySource
from moeforge.tensors import BY_NAME, TensorSpec

SHAPE, ROUNDS = (2048, 5632), 5
SPEC = TensorSpec(BY_NAME["bfloat16"], SHAPE)
_TASK = {"weight": (None, 1.0, 1.0, 1.0), "density": (None, 0.5, 0.5, 0.5), "lambda": 1.0}
_PLAIN = {**_TASK, "normalize": False, "rescale": False}
_DRAWN = {**_TASK, "normalize": False, "rescale": True, "key": 7}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "linear": (3, {"weight": (0.5, 0.3, 0.2), "normalize": True}),
    "task_arithmetic": (4, {**_PLAIN, "density": (None, 1.0, 1.0, 1.0)}),
    "slerp": (2, {"t": 0.4}),
    "ties": (4, {**_PLAIN, "normalize": True}),
    "dare_ties": (4, _DRAWN),
    "breadcrumbs": (4, {**_PLAIN, "gamma": (None, 0.01, 0.01, 0.01)}),
    "model_stock": (4, {"filter_wise": False}),
    "sce": (4, {"select_topk": 0.2}),
    "della": (4, {**_DRAWN, "normalize": True, "epsilon": (None, 0.1, 0.1, 0.1)}),
}
"""Number of inputs, a base included, and the parameters as planners hand them over."""


class File(MemorySource):
    """A tensor that is read from a file, as a checkpoint's are."""

    def __init__(self, key: str, folder: Path, tensor: torch.Tensor) -> None:
        data = bytes(tensor.flatten().view(torch.uint8).numpy())
        super().__init__(key, {"x": (SPEC, data)})
        (folder / key).write_bytes(data)
        self._file = os.open(folder / key, os.O_RDONLY)

    def read(self, name: str, start: int, out: memoryview) -> None:
        """Read into `out`."""
        if os.preadv(self._file, [out], start) != len(out):
            sys.exit("the file is too short")


class Memory:
    """Takes what is written."""

    def __init__(self, first: int) -> None:
        self.first, self.data = first, bytearray(SPEC.nbytes)

    def write(self, shard: str, data: memoryview, offset: int) -> None:
        """Keep `data`."""
        self.data[offset - self.first : offset - self.first + len(data)] = data


def inputs(folder: Path) -> list[File]:
    """Return a base, and three models that differ from it by row."""
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(SHAPE, generator=draw) * 0.02
    far = torch.rand(SHAPE[0], 1, generator=draw) * 0.003
    tensors = [base, *(base + torch.randn(SHAPE, generator=draw) * far for _ in range(3))]
    return [File(str(i), folder, tensor.bfloat16()) for i, tensor in enumerate(tensors)]


def measure(word: str, sources: list[File]) -> tuple[float, bytes]:
    """Return seconds of CPU time, and the result."""
    count, params = CASES[word]
    reads = tuple(Read(source.key, "x") for source in sources[:count])
    tensor = PlannedTensor("y", SPEC, Merge(word, reads, tuple(params.items())))
    plan = Plan("merge", (tensor,), {}, {s.key: s for s in sources[:count]}, sources[0])
    shards, best = lay_out(plan.tensors), float("inf")
    for _ in range(ROUNDS):
        sink = Memory(shards[0].entries[0].offset)
        (job,) = jobs_of(plan, shards, sink)
        worker, more = Evaluator(plan, DEFAULT_SLICE), True
        began = time.process_time()
        while more:
            for chunk in job.chunks():
                chunk(worker, lambda count: None)
            more = job.advance()
        best = min(best, time.process_time() - began)
    return best, bytes(sink.data)


def main() -> None:
    """Run the benchmark."""
    print("| method | inputs | torch, ms | compiled, ms | ns per element of an input |")
    print("|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        sources = inputs(Path(folder))
        for word in sys.argv[1:] or CASES:
            kernels.unload()
            slow, expected = measure(word, sources)
            if not kernels.load(methods.load(word).kernels, narrow=True):
                sys.exit("numba is not there")
            fast, found = measure(word, sources)
            if found != expected:
                sys.exit(f"{word}: the bytes differ")
            count = CASES[word][0]
            each = fast / (count * SPEC.numel) * 1e9
            print(f"| {word} | {count} | {slow * 1e3:.0f} | {fast * 1e3:.0f} | {each:.2f} |")


if __name__ == "__main__":
    main()

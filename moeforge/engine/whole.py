"""Owns tensors that are needed whole and in memory, such as the weights of a layer that runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeforge.engine.jobs import MergeJob
from moeforge.plans import Expr, Plan
from moeforge.tensors import FLOAT32

if TYPE_CHECKING:
    from torch import Tensor


class _Memory:
    def __init__(self, memory: memoryview) -> None:
        self._memory = memory

    def write(self, shard: str, data: memoryview, offset: int) -> None:
        self._memory[offset : offset + len(data)] = data


def evaluate(plan: Plan, expr: Expr, numel: int) -> Tensor:
    """Return all elements of `expr`, flat, in float32 on the CPU.

    Args:
        plan: holds the sources of `expr`.
        expr: what to compute.
        numel: its number of elements.
    """
    import torch

    from moeforge.engine.evaluate import Evaluator
    from moeforge.methods import BLOCK

    result = torch.empty(numel, dtype=torch.float32)
    raw: Any = result.view(torch.uint8).numpy()
    sink = _Memory(memoryview(raw))
    job = MergeJob("", expr, numel, FLOAT32, plan, "", 0, sink)
    threads = torch.get_num_threads()
    try:
        worker = Evaluator(plan, BLOCK)
        while True:
            for chunk in job.chunks():
                chunk(worker, lambda count: None)
            if not job.advance():
                return result
    finally:
        torch.set_num_threads(threads)

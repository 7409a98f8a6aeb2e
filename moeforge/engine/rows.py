"""Owns expressions that are computed in whole rows: adapters, float8 and gathered vocabularies."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from moeforge.engine.dequantize import dequantized_rows
from moeforge.engine.lora import adapted_rows
from moeforge.methods import BLOCK, CHUNK, Place
from moeforge.plans import Dequantize, Expr, Gather, Lora, RowTable

if TYPE_CHECKING:
    from torch import Tensor

    from moeforge.engine.evaluate import Evaluator


@dataclass
class Whole:
    """What is known of whole tensors while one output tensor is made; shared by the workers.

    Attributes:
        stats: what measurements returned, by id of the expression.
    """

    stats: dict[int, Any] = field(default_factory=dict)
    _held: dict[Any, Any] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what stands under `key`, made by the first who asks."""
        with self._lock:
            if key not in self._held:
                self._held[key] = make()
            return self._held[key]

    def clear(self) -> None:
        """Forget everything."""
        self.stats.clear()
        self._held.clear()


def evaluate(
    worker: Evaluator,
    node: Lora | Dequantize | Gather,
    working: torch.dtype,
    whole: Whole,
    start: int,
    count: int,
) -> Tensor:
    """Return elements [start, start + count) of `node`, in memory of their own."""
    if isinstance(node, Gather):
        return _gather(worker, node, working, whole, start, count)
    place = Place(worker.plan.shape(node), start)
    total, columns = place.shape[0], place.shape[-1]
    # Always the same groups of rows: a matrix product may depend on how many it is made for.
    group = place.group // place.row
    if worker.device.type == "cuda":
        group *= max(1, CHUNK // place.group)
    first = start // columns // group * group if columns else 0
    end = min(-(-(start + count) // columns) if columns else 0, total)
    parts = [
        _rows(worker, node, working, whole, low, min(low + group, total) - low)
        for low in range(first, end, group)
    ]
    if not parts:
        return torch.empty(0, dtype=working, device=worker.device)
    return torch.cat(parts).flatten()[start - first * columns :][:count]


def _rows(
    worker: Evaluator,
    node: Lora | Dequantize,
    working: torch.dtype,
    whole: Whole,
    first: int,
    count: int,
) -> Tensor:
    """Return rows [first, first + count) of `node`, [count, columns]."""
    shape = worker.plan.shape(node)
    matrix = node.weight if isinstance(node, Lora) else node.codes
    part = torch.empty(count, shape[-1], dtype=working, device=worker.device)
    worker.fill(matrix, working, whole, first * shape[-1], part.view(-1))

    def held(expr: Expr) -> Tensor:
        def make() -> Tensor:
            tensor = torch.empty(worker.plan.shape(expr), dtype=working, device=worker.device)
            worker.fill(expr, working, whole, 0, tensor.view(-1))
            worker.settle()  # others use it, too
            return tensor

        found: Tensor = whole.get((expr, worker.device), make)
        return found

    if isinstance(node, Dequantize):
        return dequantized_rows(part, first, shape[0], held(node.scale))
    magnitude = held(node.magnitude) if node.magnitude else None
    return adapted_rows(node, part, first, held(node.a), held(node.b), magnitude)


def _gather(
    worker: Evaluator, node: Gather, working: torch.dtype, whole: Whole, start: int, count: int
) -> Tensor:
    width = torch.Size(worker.plan.shape(node)[1:]).numel()
    first, last = start // width, -(-(start + count) // width)
    result = torch.empty(last - first, width, dtype=working, device=worker.device)
    known = len(node.table.source)
    for begin, end, source, row in _runs(node.table, first, min(last, known)):
        target = result[begin - first : end - first]
        if source == RowTable.ZERO:
            target.zero_()
        elif source == RowTable.MEAN:
            pairs = node.table.means[row]
            several = torch.empty(len(pairs), width, dtype=working, device=worker.device)
            for part, (i, number) in zip(several, pairs, strict=True):
                worker.fill(node.inputs[i], working, whole, number * width, part)
            target.copy_(several.mean(0))
        else:
            worker.fill(node.inputs[source], working, whole, row * width, target.view(-1))
    if last > known:
        key = (id(node), "mean", worker.device)
        mean = whole.get(key, lambda: _mean(worker, node, working, whole, width))
        result[max(known - first, 0) :] = mean
    return result.flatten()[start - first * width :][:count]


def _mean(
    worker: Evaluator, node: Gather, working: torch.dtype, whole: Whole, width: int
) -> Tensor:
    """Return the mean of all rows of the table, added up in float64 in their order."""
    known = len(node.table.source)
    total = torch.zeros(width, dtype=torch.float64, device=worker.device)
    step = max(1, BLOCK // width)
    for low in range(0, known, step):
        rows = min(step, known - low)
        part = _gather(worker, node, working, whole, low * width, rows * width)
        total += part.view(rows, width).double().sum(0)
    mean = (total / max(known, 1)).to(working)
    worker.settle()  # others use it, too
    return mean


def _runs(table: RowTable, low: int, high: int) -> list[tuple[int, int, int, int]]:
    """Return begin, end, source and first row of each run of rows that lie together in a source."""
    import numpy as np

    if low >= high:
        return []
    source, row = np.asarray(table.source)[low:high], np.asarray(table.row)[low:high]
    steps = (source[1:] != source[:-1]) | (
        (row[1:] != row[:-1] + 1) & (source[1:] != RowTable.ZERO)
    )
    steps |= source[1:] == RowTable.MEAN
    borders = [0, *(np.flatnonzero(steps) + 1).tolist(), high - low]
    return [
        (low + begin, low + end, int(source[begin]), int(row[begin]))
        for begin, end in pairwise(borders)
    ]

"""Owns expressions that lay elements out anew: matrices side by side, and the other way round.

Knows no file and no dtype: it asks the worker for elements of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moeforge.engine import BAND
from moeforge.methods import BLOCK
from moeforge.plans import Columns, Transpose

if TYPE_CHECKING:
    from torch import Tensor

    from moeforge.engine.evaluate import Evaluator
    from moeforge.engine.rows import Whole


@dataclass
class Band:
    """Some rows of a transposed matrix, kept for the slices that follow.

    Attributes:
        node: the matrix; kept so that no other can have its id.
        rows: the rows, [height, columns]; fewer of them count in the last band.
        number: which band it is; -1 while it is none.
    """

    node: Transpose
    rows: Tensor
    number: int = -1


def side_by_side(
    worker: Evaluator, node: Columns, working: torch.dtype, whole: Whole, start: int, out: Tensor
) -> None:
    """Put elements of `node` from `start` on into `out`; computed in whole rows of the inputs."""
    if not out.numel():
        return
    first, last = start // node.width, -(-(start + out.numel()) // node.width)
    result = torch.zeros(last - first, node.width, dtype=working, device=worker.device)
    end = 0
    for expr in node.inputs:
        columns = worker.plan.shape(expr)[-1]
        part = torch.empty(last - first, columns, dtype=working, device=worker.device)
        worker.fill(expr, working, whole, first * columns, part.view(-1))
        result[:, end : end + columns] = part
        end += columns
    out.copy_(result.view(-1)[start - first * node.width :][: out.numel()])


def transposed(
    worker: Evaluator, node: Transpose, working: torch.dtype, whole: Whole, start: int, out: Tensor
) -> None:
    """Put elements of `node` from `start` on into `out`, out of bands of its rows.

    For each band the whole input is evaluated, in groups of its rows that are always the same, and
    the band's columns are kept. Reading the rest in vain costs less than a call for each row does.
    """
    rows, columns = worker.plan.shape(node)
    if not out.numel():
        return
    height = max(1, min(rows, BAND // columns))
    band = worker.bands.get((id(node), working))
    if band is None:
        band = Band(node, torch.empty(height, columns, dtype=working, device=worker.device))
        worker.bands[id(node), working] = band
    size, end = height * columns, start + out.numel()
    for number in range(start // size, -(-end // size)):
        if band.number != number:
            kept = band.rows[: rows - number * height]
            _keep(worker, node, working, whole, number * height, kept)
            band.number = number
        low, high = max(start, number * size), min(end, (number + 1) * size)
        found = band.rows.view(-1)[low - number * size : high - number * size]
        out[low - start : high - start].copy_(found)


def _keep(
    worker: Evaluator, node: Transpose, working: torch.dtype, whole: Whole, first: int, band: Tensor
) -> None:
    """Put columns [first, first + height) of the input of `node` into `band`, as rows."""
    rows, columns = worker.plan.shape(node.input)
    step = max(1, BLOCK // columns)
    for low in range(0, rows, step):
        part = torch.empty(min(step, rows - low), columns, dtype=working, device=worker.device)
        worker.fill(node.input, working, whole, low * columns, part.view(-1))
        band[:, low : low + len(part)] = part[:, first : first + len(band)].T

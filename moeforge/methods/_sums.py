"""Owns sums over whole tensors that do not depend on how the work is divided."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from moeforge import kernels
from moeforge.methods import BLOCK, Measurement, Place, Scan

if TYPE_CHECKING:
    from torch import Tensor

LANES = 2**10
"""Sums that a block's elements are added up in side by side, so that compiled code can do the same
as numpy: those whose numbers leave the same remainder, in their order."""


def blocks(tensors: Tensor) -> Iterable[Tensor]:
    """Return the blocks [inputs, elements] of slices that begin at a block's start."""
    return tensors.split(BLOCK, dim=-1)  # type: ignore[no-any-return, no-untyped-call]


def result_of(count: int, place: Place) -> Tensor:
    """Return memory for a result of kernels: where it goes, if they can write what goes there."""
    import torch

    out = place.out
    known = out is not None and out.device.type == "cpu" and out.is_contiguous()
    if out is not None and known and out.dtype in (torch.bfloat16, torch.float32):
        return out
    return torch.empty(count)


def weighted(tensors: Tensor, weights: Sequence[float], place: Place) -> Tensor:
    """Return Σ wᵢ·xᵢ, added up in order, every product and sum rounded; overwrites `tensors`."""
    import numpy as np

    if (matrix := kernels.matrix(tensors)) is not None:
        from moeforge.kernels.sums import weighted as compiled

        out = result_of(matrix.shape[1], place)
        compiled(matrix, np.array(weights, np.float32), kernels.matrix(out))
        return out
    # Not add_(…, alpha): whether that rounds the product depends on the processor.
    result = tensors[0].mul_(weights[0])
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        result.add_(tensor.mul_(weight))
    return result


def lane_sums(block: Tensor) -> Any:
    """Return the sums of a block's elements by their number's remainder, each in its order.

    Args:
        block: [rows, elements] in float32 or float64, on the CPU; rows may lie apart.

    Returns:
        numpy [rows, LANES], of the dtype of the block.
    """
    import numpy as np

    values = block.numpy()
    whole = values.shape[1] // LANES * LANES
    lanes = values[:, :whole].reshape(len(values), -1, LANES)
    sums = np.add.reduce(lanes, axis=1, initial=0.0)
    sums[:, : values.shape[1] - whole] += values[:, whole:]
    return sums


def joined(lanes: Any) -> list[Any]:
    """Return what lanes, the last dimension, add up to in float64, halves added to halves."""
    import numpy as np

    lanes = lanes.astype(np.float64)
    while (half := lanes.shape[-1] // 2) > 0:
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0].tolist()  # type: ignore[no-any-return]


def sums_for(matrix: Any, rows: int) -> Any:
    """Return memory for kernels to put sums into, of `rows` rows of each block: [blocks, rows]."""
    import numpy as np

    return np.empty((max(-(-matrix.shape[1] // BLOCK), 1), rows))


def absolute(tensors: Tensor) -> list[list[float]]:
    """Return Σ|x| of each tensor for each block: [blocks][tensors]."""
    if tensors.device.type == "cuda":
        from moeforge.methods._gpu import block_sums

        return block_sums(tensors.abs()).T.tolist()
    return [joined(lane_sums(block.abs())) for block in blocks(tensors)]


def add_up(sums: Iterable[Sequence[float]]) -> tuple[float, ...]:
    """Return the columns' sums, exactly rounded."""
    return tuple(map(math.fsum, zip(*sums, strict=True)))


def total(look: Callable[[Tensor, Place], list[Any]]) -> Measurement:
    """Scan once for sequences of sums, one for each block, and return their totals."""

    def join(pieces: list[list[Any]]) -> tuple[float, ...]:
        return add_up(sums for piece in pieces for sums in piece)

    return add_up((yield Scan(look, join)))


def gram(vectors: Callable[[Tensor], Tensor]) -> Measurement:
    """Scan once and return the Gram matrix ⟨vᵢ, vⱼ⟩ of whole tensors, [n, n] in float64.

    Products of float32 numbers are exact in float64, so the angle between nearly equal tensors
    keeps eight digits more than in float32.

    Args:
        vectors: the vectors of a slice, from its inputs; [n, elements] both.
    """
    import torch

    def look(tensors: Tensor, place: Place) -> list[Tensor]:
        if tensors.device.type == "cuda":
            from moeforge.methods._gpu import gram as products

            return products(vectors(tensors))
        matrices = (block.double() for block in blocks(vectors(tensors)))
        return [(matrix @ matrix.T).cpu() for matrix in matrices]

    def join(pieces: list[list[Tensor]]) -> Tensor:
        return torch.stack([product for piece in pieces for product in piece]).sum(0)

    return torch.stack((yield Scan(look, join))).sum(0)

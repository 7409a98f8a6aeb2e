"""Owns the arithmetic of an adapted matrix; knows no plan beyond its `Lora` node, and no file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moeforge.plans import Lora

if TYPE_CHECKING:
    from torch import Tensor


def adapted_rows(
    node: Lora, weight: Tensor, first: int, a: Tensor, b: Tensor, magnitude: Tensor | None
) -> Tensor:
    """Return rows [first, first + n) of the adapted matrix.

    Source: Hu et al., arXiv 2106.09685, equation 3; Liu et al., arXiv 2402.09353, equation 5,
    where the lengths are those of the rows of a matrix stored as [out, in].

    Args:
        node: scale and orientation.
        weight: rows [first, first + n) of W, [n, columns]; overwritten.
        first: number of the first row.
        a: A, [rank, in], whole.
        b: B, [out, rank], whole.
        magnitude: DoRA's lengths [out], whole; never given for a transposed matrix, whose rows
            are not outputs.

    All tensors are of the working dtype; so is the result, [n, columns].
    """
    rows = slice(first, first + weight.shape[0])
    if node.transposed:
        return weight.addmm_(a[:, rows].T, b.T, alpha=node.scale)
    weight.addmm_(b[rows], a, alpha=node.scale)
    if magnitude is not None:
        weight.mul_((magnitude[rows] / torch.linalg.vector_norm(weight, dim=1)).unsqueeze(1))
    return weight

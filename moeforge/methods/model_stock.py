"""model_stock: between the base and the models' average, as far as the angles between them say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeforge import kernels
from moeforge.methods import BLOCK, Measurement, Method, Param, Params, Place, Scan
from moeforge.methods._sums import LANES, blocks, result_of
from moeforge.methods._task import FEW, deltas, summed

if TYPE_CHECKING:
    from torch import Tensor

_SHORTEST = 1e-6
"""Floor of the product of two lengths, so that the cosine of tiny differences is near zero."""


def ratio(products: Tensor) -> Tensor:
    """Return how far to go from the base to the models' average: t = k·cos θ / (1 + (k−1)·cos θ).

    cos θ is the mean cosine between pairs of the k models' differences from the base; t is zero
    where the divisor vanishes. Source: Jang et al., "Model Stock", arXiv 2403.19522.

    Args:
        products: inner products of the differences, [k, k, …] in float64.
    """
    import torch

    count = len(products)
    lengths = products.diagonal().movedim(-1, 0).clamp(min=0.0).sqrt()
    cosines = [
        (products[i, j] / (lengths[i] * lengths[j]).clamp(min=_SHORTEST)).clamp(-1.0, 1.0)
        for i in range(count)
        for j in range(i + 1, count)
    ]
    cosine = torch.stack(cosines).mean(0)
    divisor = 1.0 + (count - 1) * cosine
    return torch.where(divisor.abs() < 1e-6, 0.0, count * cosine / divisor)


def _products(tensors: Tensor, place: Place) -> list[Any]:
    """Return the upper half of each block's inner products of the differences, numpy [k, k].

    In float64, where products of float32 numbers are exact.
    """
    import numpy as np

    if tensors.device.type == "cuda":
        from moeforge.methods._gpu import gram

        return [products.triu().numpy() for products in gram(deltas(tensors))]
    count = len(tensors) - 1
    number = max(-(-tensors.shape[1] // BLOCK), 1)
    lanes = np.zeros((number, count, count, LANES))
    if (matrix := kernels.matrix(tensors)) is not None:
        from moeforge.kernels.products import products as compiled

        # By numbers, not slices: numba compiles for matrices whose rows follow one another.
        for i, found in enumerate(lanes):
            compiled(matrix, i * BLOCK, min((i + 1) * BLOCK, matrix.shape[1]), found)
        return list(lanes.sum(-1))
    for found, block in zip(lanes, blocks(deltas(tensors)), strict=True):
        missing = -block.shape[1] % LANES
        wide = np.pad(block.double().numpy(), ((0, 0), (0, missing))).reshape(count, -1, LANES)
        for i in range(count):
            for k in range(i, count):
                np.add.reduce(wide[i] * wide[k], axis=0, out=found[i, k])
    return list(lanes.sum(-1))


def _added(pieces: list[list[Any]]) -> Any:
    return sum(product for piece in pieces for product in piece)


def measure(params: Params, place: Place) -> Measurement:
    """Return t of the whole tensor; None where each row has its own."""
    import numpy as np
    import torch

    if params["filter_wise"]:
        return None
    upper = sum((yield Scan(_products, _added)))
    return float(ratio(torch.from_numpy(upper + np.triu(upper, 1).T)))


def merge(tensors: Tensor, params: Params, stats: float | None, place: Place) -> Tensor:
    """Return base + t · mean difference."""
    import torch

    models = len(tensors) - 1
    matrix = kernels.matrix(tensors) if models <= FEW else None
    if matrix is not None and stats is not None:
        import numpy as np

        from moeforge.kernels.products import towards

        out = result_of(matrix.shape[1], place)
        towards(matrix, np.float32(stats / models), kernels.matrix(out))
        return out
    base, differences = tensors[0], deltas(tensors)
    if stats is None:
        rows_KRC = differences.reshape(len(differences), -1, place.row).double()
        each = ratio(torch.einsum("irc,jrc->ijr", rows_KRC, rows_KRC).cpu())
        t: Any = each.to(differences).repeat_interleave(place.row)
    else:
        t = stats
    return summed(differences).mul_(t / len(differences)).add_(base)


METHOD = Method(
    title="Model Stock",
    merge=merge,
    params={"filter_wise": Param(bool, False)},
    inputs=(3, None),
    base="required",
    measure=measure,
    kernels=("differences", "products"),
    multiplies=True,
    rows=lambda params: bool(params["filter_wise"]),
    paper="https://arxiv.org/abs/2403.19522",
)

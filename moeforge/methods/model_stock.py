"""model_stock: between the base and the models' average, as far as the angles between them say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeforge.methods import Measurement, Method, Param, Params, Place
from moeforge.methods._sums import gram
from moeforge.methods._task import deltas, summed

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


def measure(params: Params, place: Place) -> Measurement:
    """Return t of the whole tensor; None where each row has its own."""
    return None if params["filter_wise"] else float(ratio((yield from gram(deltas))))


def merge(tensors: Tensor, params: Params, stats: float | None, place: Place) -> Tensor:
    """Return base + t · mean difference."""
    import torch

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
    kernels=("differences",),
    multiplies=True,
    rows=lambda params: bool(params["filter_wise"]),
    paper="https://arxiv.org/abs/2403.19522",
)

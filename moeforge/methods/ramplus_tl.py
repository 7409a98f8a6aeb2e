"""ramplus_tl: ram, with what only one model changes enlarged where it shares much, per tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeforge.methods import Measurement, Method, Param, Params, Place
from moeforge.methods._active import active
from moeforge.methods._sums import total

if TYPE_CHECKING:
    from torch import Tensor


def measure(params: Params, place: Place) -> Measurement:
    """Return λᵢ = 1 + r·clamp(ρᵢ, 0, alpha) of each model, ρᵢ being shared over unique elements."""
    import torch

    epsilon = params["epsilon"]

    def look(tensors: Tensor, here: Place) -> list[tuple[float, ...]]:
        _, where, count = active(tensors, epsilon)
        alone = torch.eq(count, 1.0, out=torch.empty_like(count))
        everywhere = where.sum(1, dtype=torch.float64).tolist()
        return [(*everywhere, *where.mul_(alone).sum(1, dtype=torch.float64).tolist())]

    counts = yield from total(look)
    models = len(counts) // 2
    ratios = [
        (everywhere - unique) / max(unique, epsilon)
        for everywhere, unique in zip(counts[:models], counts[models:], strict=True)
    ]
    return tuple(1.0 + params["r"] * min(max(rho, 0.0), params["alpha"]) for rho in ratios)


def merge(tensors: Tensor, params: Params, stats: tuple[float, ...], place: Place) -> Tensor:
    """Return base + mean of the differences that exceed epsilon, unique ones times λ."""
    import torch

    parts, _, count = active(tensors, params["epsilon"])
    alone = torch.eq(count, 1.0, out=torch.empty_like(count))
    result = torch.zeros_like(count)
    for part, factor in zip(parts, stats, strict=True):
        result.add_(part).addcmul_(part, alone, value=factor - 1.0)
    return tensors[0].add_(result.div_(count.clamp_(min=1.0)))


METHOD = Method(
    title="Reinforced Agent Merging Plus (Tensor-Local)",
    merge=merge,
    params={
        "r": Param(float, 0.1),
        "alpha": Param(float, 0.2),
        "epsilon": Param(float, 1e-5),
    },
    inputs=(1, None),
    base="required",
    measure=measure,
    paper="https://arxiv.org/abs/2601.13572",
)

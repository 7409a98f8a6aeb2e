"""ram: what only one model changes is kept whole, what several change is averaged over them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeforge.methods import Method, Param, Params, Place
from moeforge.methods._active import active

if TYPE_CHECKING:
    from torch import Tensor


def merge(tensors: Tensor, params: Params, stats: Any, place: Place) -> Tensor:
    """Return base + the mean, element by element, of the differences that exceed epsilon."""
    parts, _, count = active(tensors, params["epsilon"])
    return tensors[0].add_(parts.sum(0).div_(count.clamp_(min=1.0)))


METHOD = Method(
    title="Reinforced Agent Merging",
    merge=merge,
    params={"epsilon": Param(float, 1e-5)},
    inputs=(1, None),
    base="required",
    paper="https://arxiv.org/abs/2601.13572",
)

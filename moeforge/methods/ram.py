"""ram: what only one model changes is kept whole, what several change is averaged over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moeforge.methods import Method, Param, Params, Place
from moeforge.methods._active import active

if TYPE_CHECKING:
    from torch import Tensor


def merge(tensors: Sequence[Tensor], params: Params, stats: Any, place: Place) -> Tensor:
    """Return base + the mean, element by element, of the differences that exceed epsilon."""
    parts, _, count = active(tensors, params["epsilon"])
    result = parts[0]
    for part in parts[1:]:
        result.add_(part)
    return tensors[0].add_(result.div_(count.clamp_(min=1.0)))


METHOD = Method(
    title="Reinforced Agent Merging",
    merge=merge,
    params={"epsilon": Param(float, 1e-5)},
    inputs=(1, None),
    base="required",
    paper="https://arxiv.org/abs/2601.13572",
)

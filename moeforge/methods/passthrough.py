"""passthrough: the one input as it is, or times a factor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeforge.methods import Method, Param, Params, Place

if TYPE_CHECKING:
    from torch import Tensor


def merge(tensors: Tensor, params: Params, stats: Any, place: Place) -> Tensor:
    """Return scale · x. Where `scale` is not set the planner leaves the tensor a plain copy."""
    return tensors[0].mul_(params["scale"][0])


METHOD = Method(
    title="Passthrough",
    merge=merge,
    params={"scale": Param(float, None, scope="input")},
    inputs=(1, 1),
)

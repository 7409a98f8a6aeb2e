"""nearswap: the other model where it is near the base, the less of it the farther it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeforge.methods import REQUIRED, Method, Param, Params, Place

if TYPE_CHECKING:
    from torch import Tensor


def merge(tensors: Tensor, params: Params, stats: Any, place: Place) -> Tensor:
    """Return w·x + (1 − w)·base with w = clamp(t / max(|base − x|, 1e-6), 0, 1)."""
    base, other = tensors
    share = (base - other).abs_().clamp_(min=1e-6).reciprocal_().mul_(params["t"]).clamp_(0.0, 1.0)
    other.mul_(share)
    result: Tensor = other.addcmul_(base, share.neg_().add_(1.0))
    return result


METHOD = Method(
    title="NearSwap",
    merge=merge,
    params={"t": Param(float, REQUIRED)},
    inputs=(2, 2),
    base="required",
    paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
)

"""linear: weighted average ("model soup")."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeforge.methods import REQUIRED, Method, Param, Params, Place
from moeforge.methods._sums import weighted

if TYPE_CHECKING:
    from torch import Tensor


def check(params: Params) -> str:
    """Refuse weights whose sum is zero where they are to be normalised by it."""
    if params["normalize"] and sum(params["weight"]) == 0:
        return "the weights sum to zero, and normalize divides by their sum"
    return ""


def merge(tensors: Tensor, params: Params, stats: Any, place: Place) -> Tensor:
    """Return Σ wᵢ·xᵢ; with `normalize`, the weights are first divided by their sum."""
    divisor = sum(params["weight"]) if params["normalize"] else 1.0
    return weighted(tensors, [weight / divisor for weight in params["weight"]], place)


METHOD = Method(
    title="Linear",
    merge=merge,
    params={
        "weight": Param(float, REQUIRED, scope="input"),
        "normalize": Param(bool, True),
    },
    inputs=(1, None),
    kernels=("sums",),
    check=check,
    paper="https://arxiv.org/abs/2203.05482",
)

"""slerp: spherical interpolation between a base and one other model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moeforge import kernels
from moeforge.methods import BLOCK, REQUIRED, Measurement, Method, Param, Params, Place
from moeforge.methods._sums import blocks, joined, lane_sums, sums_for, total, weighted

if TYPE_CHECKING:
    from torch import Tensor

_ZERO_NORM = 1e-8
"""A norm up to this is taken for zero and replaced by one, as mergekit does."""
_COLLINEAR = 0.9995
"""Above this |cosine| the arc is flat: linear interpolation, which needs no division by sin θ."""


def _sums(tensors: Tensor, place: Place) -> list[list[float]]:
    """Return Σa², Σb², Σab of each block, a being the base.

    A block's sums are in float32, good to some 1e-7; blocks are added up exactly.
    """
    import torch

    if tensors.device.type == "cuda":
        from moeforge.methods._gpu import block_sums

        a, b = tensors
        sums = block_sums(torch.stack([a * a, b * b, a * b]))
        return sums.T.tolist()
    if (matrix := kernels.matrix(tensors)) is not None:
        from moeforge.kernels.angles import squares

        sums = sums_for(matrix, 3)
        squares(matrix, BLOCK, sums)
        return sums.tolist()  # type: ignore[no-any-return]
    products = (torch.stack([a * a, b * b, a * b]) for a, b in blocks(tensors))
    return [joined(lane_sums(block)) for block in products]


def measure(params: Params, place: Place) -> Measurement:
    """Return the factors of base and other model."""
    return coefficients(params["t"], (yield from total(_sums)))


def coefficients(t: float, sums: tuple[float, ...]) -> tuple[float, float]:
    """Return the factors of base and other model for whole-tensor sums Σa², Σb², Σab.

    θ is the angle between the flattened tensors; the factors are sin((1−t)θ)/sin θ and
    sin(tθ)/sin θ, or 1−t and t where the tensors are collinear or opposite.
    Source: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985.
    """
    norm_a, norm_b = math.sqrt(sums[0]), math.sqrt(sums[1])
    norm_a = norm_a if norm_a > _ZERO_NORM else 1.0
    norm_b = norm_b if norm_b > _ZERO_NORM else 1.0
    cosine = max(-1.0, min(1.0, sums[2] / (norm_a * norm_b)))
    if abs(cosine) > _COLLINEAR:
        return 1.0 - t, t
    theta = math.acos(cosine)
    return math.sin((1.0 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


def merge(tensors: Tensor, params: Params, stats: tuple[float, float], place: Place) -> Tensor:
    """Return factor_a · a + factor_b · b."""
    return weighted(tensors, stats, place)


METHOD = Method(
    title="SLERP",
    merge=merge,
    params={"t": Param(float, REQUIRED)},
    inputs=(2, 2),
    kernels=("angles", "sums"),
    base="required",
    measure=measure,
    paper="https://en.wikipedia.org/wiki/Slerp",
)

"""multislerp: weighted mean of directions on the sphere, by one step in a tangent space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moeforge.methods import REQUIRED, Measurement, Method, Param, Params, Place
from moeforge.methods._sphere import combine, length, norms
from moeforge.methods._sums import gram
from moeforge.methods._task import deltas

if TYPE_CHECKING:
    from torch import Tensor


def _split(tensors: Tensor, params: Params) -> tuple[Tensor | None, Tensor]:
    """Return the base, if there is one, and the vectors: differences from it, or the inputs."""
    if params["weight"][0] is None:
        return tensors[0], deltas(tensors)
    return None, tensors


def factors(products: Tensor, weights: Sequence[float], eps: float) -> tuple[float, ...]:
    """Return the factor of each vector.

    With unit vectors uᵢ and their normalised weighted mean m: the weighted mean T of the tangents
    uᵢ − ⟨uᵢ, m⟩m is followed from m for the length ‖T‖, and the result is given the weighted mean
    length.

    Args:
        products: Gram matrix of the vectors [n, n].
        weights: of the vectors.
        eps: lengths below this count as zero.

    Raises:
        ValueError: the weighted directions cancel out.
    """
    import torch

    weight = torch.tensor(weights, dtype=torch.float64)
    lengths = norms(products)
    units = lengths + eps
    cosines = products / units[:, None] / units
    mean = weight.clone()
    norm = length(cosines, mean)
    if norm < eps:
        # Two that cancel out, and vectors that are all zero, have at least a sum.
        if len(weights) == 2 or not bool((lengths >= eps).any()):
            return tuple(weights)
        raise ValueError("the weighted directions of the models cancel out: no mean direction")
    mean = mean / norm
    tangent = weight - (weight * (cosines @ mean)).sum() * mean
    step = length(cosines, tangent) + eps
    point = mean * math.cos(step) + tangent * (math.sin(step) / step)
    return tuple((point * float((weight * lengths).sum()) / units).tolist())


def measure(params: Params, place: Place) -> Measurement:
    """Return the factor of each vector."""
    weights = [weight for weight in params["weight"] if weight is not None]
    if len(weights) == 1:
        return (1.0,)
    if params["normalize_weights"]:
        weights = [weight / sum(weights) for weight in weights]
    products = yield from gram(lambda tensors: _split(tensors, params)[1])
    return factors(products, weights, params["eps"])


def merge(tensors: Tensor, params: Params, stats: tuple[float, ...], place: Place) -> Tensor:
    """Return base + Σ fᵢ·vᵢ; a single model as it is, whatever base and weight."""
    if len(stats) == 1:
        return tensors[-1]
    base, vectors = _split(tensors, params)
    result = combine(vectors, stats)
    return result if base is None else base.add_(result)


def check(params: Params) -> str:
    """Refuse weights whose sum is zero where they are to be normalised by it."""
    weights = [weight for weight in params["weight"] if weight is not None]
    if params["normalize_weights"] and len(weights) > 1 and sum(weights) == 0:
        return "the weights sum to zero, and normalize_weights divides by their sum"
    return ""


METHOD = Method(
    title="Multi-SLERP",
    merge=merge,
    params={
        "weight": Param(float, REQUIRED, "non_base"),
        "normalize_weights": Param(bool, True),
        "eps": Param(float, 1e-8),
    },
    inputs=(1, None),
    base="optional",
    measure=measure,
    multiplies=True,
    check=check,
    paper="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
)

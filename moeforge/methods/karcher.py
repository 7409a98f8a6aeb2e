"""karcher: the point on the sphere nearest to all inputs by squared angles (Riemannian mean).

In memory: a slice of each input. The iteration is over coefficients, not over tensors.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moeforge.methods import Measurement, Method, Param, Params, Place
from moeforge.methods._sphere import combine, length, norms
from moeforge.methods._sums import gram

if TYPE_CHECKING:
    from torch import Tensor

_OPPOSITE = 1e-6
"""Angles nearer to π are taken for it: there the direction is nothing but rounding."""


def mean(lengths: Tensor, cosines: Tensor, most: int, tolerance: float) -> Tensor:
    """Return the coefficients cᵢ of the mean Σ cᵢuᵢ of unit vectors uᵢ, itself of length one.

    Fixed-point iteration: the mean tangent at the present point is followed until it is shorter
    than `tolerance`. Source: Karcher, "Riemannian center of mass and mollifier smoothing", 1977.

    Args:
        lengths: of the inputs [n]; those up to `tolerance` do not take part.
        cosines: inner products of the unit vectors [n, n].
        most: iterations.
        tolerance: see above.
    """
    import torch

    taking = (lengths > tolerance).double()
    share = taking / taking.sum()
    point = share.clone()
    norm = length(cosines, point)
    first = torch.zeros_like(point)
    first[int(taking.argmax())] = 1.0
    point = point / norm if norm >= tolerance else first
    for _ in range(most):
        dots = (cosines @ point).clamp(-1.0, 1.0)
        angles = dots.acos()
        # From the point opposite to an input all ways are equally far: that input pulls nowhere.
        pulls = (angles >= tolerance) & (angles < math.pi - _OPPOSITE)
        factors = torch.where(pulls, share * angles / angles.sin().clamp(min=1e-300), 0.0)
        tangent = factors - (factors * dots).sum() * point
        step = length(cosines, tangent)
        if step < tolerance:
            break
        point = math.cos(step) * point + math.sin(step) / step * tangent
        norm = length(cosines, point)
        if norm > tolerance:
            point = point / norm
    return point


def measure(params: Params, place: Place) -> Measurement:
    """Return the factor of each input, or None where all are zero."""
    import torch

    products = yield from gram(lambda tensors: tensors)
    lengths = norms(products)
    if len(lengths) == 1:
        return (1.0,)
    if not bool((lengths > params["tol"]).any()):
        return None
    safe = torch.where(lengths > 0, lengths, 1.0)
    cosines = products / safe[:, None] / safe
    point = mean(lengths, cosines, params["max_iter"], params["tol"])
    return tuple((float(lengths.mean()) * point / safe).tolist())


def merge(tensors: Tensor, params: Params, stats: tuple[float, ...] | None, place: Place) -> Tensor:
    """Return the mean at the inputs' mean length; zeros where no input is longer than `tol`."""
    return tensors[0].zero_() if stats is None else combine(tensors, stats)


METHOD = Method(
    title="Karcher Mean",
    merge=merge,
    params={"max_iter": Param(int, 10), "tol": Param(float, 1e-5)},
    inputs=(1, None),
    measure=measure,
    multiplies=True,
    paper="https://arxiv.org/abs/2603.04972",
)

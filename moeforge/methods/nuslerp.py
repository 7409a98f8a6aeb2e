"""nuslerp: spherical interpolation of two models, or of their differences from a base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeforge.methods import REQUIRED, Measurement, Method, Param, Params, Place, Scan
from moeforge.methods._sphere import combine
from moeforge.methods._sums import gram
from moeforge.methods._task import deltas

if TYPE_CHECKING:
    from torch import Tensor

_SHORTEST = 1e-7
"""Norms below this are taken for it, so that zero vectors have a direction."""
_FLAT = 2.0**-25
"""Where |cosine| is nearer to one than this, float32 says that the vectors are collinear."""


def _share(params: Params) -> float:
    """Return how far to go from the first model to the second."""
    first, second = params["weight"][-2:]
    return second / (first + second) if abs(first + second) >= 1e-6 else 0.5


def _vectors(tensors: Tensor, params: Params) -> Tensor:
    return deltas(tensors) if params["weight"][0] is None else tensors


def coefficients(t: float, products: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of first and second vectors.

    sin((1−t)θ)/sin θ and sin(tθ)/sin θ with θ the angle between them, 1−t and t where they are
    collinear or opposite.

    Args:
        t: from 0 to 1.
        products: ⟨a, a⟩, ⟨b, b⟩, ⟨a, b⟩ of each pair of vectors, [3, n] in float64.
    """
    import torch

    lengths = products[:2].sqrt().clamp(min=_SHORTEST)
    cosine = (products[2] / lengths[0] / lengths[1]).clamp(-1.0, 1.0)
    curved = 1.0 - cosine.abs() >= _FLAT
    angle = torch.where(curved, cosine, 0.0).acos()
    first = torch.where(curved, torch.sin((1.0 - t) * angle) / angle.sin(), 1.0 - t)
    second = torch.where(curved, torch.sin(t * angle) / angle.sin(), t)
    return first, second


def _columns(params: Params, place: Place) -> bool:
    """Say whether the vectors lie along the first dimension."""
    wanted = not params["nuslerp_flatten"] and params["nuslerp_row_wise"]
    return wanted and len(place.shape) > 1


def rows(params: Params) -> bool:
    """Say whether the vectors are rows, or columns that rows add up to."""
    return not params["nuslerp_flatten"]


def _products(pair: Tensor, along: int) -> Tensor:
    """Return ⟨a, a⟩, ⟨b, b⟩, ⟨a, b⟩ over dimension `along`, in float64, [3, …]."""
    import torch

    a, b = pair.double()
    return torch.stack([(a * a).sum(along), (b * b).sum(along), (a * b).sum(along)])


def measure(params: Params, place: Place) -> Measurement:
    """Return the factors of whole tensors or of columns; None where rows tell for themselves.

    In memory for columns: three float64 for each, once per chunk.
    """
    import torch

    t = _share(params)
    if params["nuslerp_flatten"]:
        products = yield from gram(lambda tensors: _vectors(tensors, params))
        flat = torch.stack([products[0, 0], products[1, 1], products[0, 1]])
        return tuple(float(factor) for factor in coefficients(t, flat[:, None]))
    if not _columns(params, place):
        return None
    width = place.numel // place.shape[0] if place.shape[0] else 0

    def look(tensors: Tensor, here: Place) -> Any:
        # A slice may begin amid a row of more than two dimensions: its elements are added one by
        # one at their places.
        products = torch.zeros(3, width, dtype=torch.float64)
        column = torch.arange(here.start, here.start + tensors[0].numel()) % width
        a, b = _vectors(tensors, params).double().cpu()
        for index, product in enumerate((a * a, b * b, a * b)):
            products[index].index_add_(0, column, product)
        return products

    def join(pieces: list[Tensor]) -> Tensor:
        return torch.stack(pieces).sum(0)

    return coefficients(t, join((yield Scan(look, join))))


def merge(tensors: Tensor, params: Params, stats: Any, place: Place) -> Tensor:
    """Return the interpolated vectors, added to the base if there is one."""
    import torch

    vectors = _vectors(tensors, params)
    if params["nuslerp_flatten"]:
        result = combine(vectors, stats)
    else:
        count = vectors[0].numel()
        if stats is not None:
            column = torch.arange(place.start, place.start + count) % len(stats[0])
            factors = [factor[column].to(vectors) for factor in stats]
        else:
            pair = vectors.reshape(2, -1, place.row)
            each = coefficients(_share(params), _products(pair, 1).cpu())
            factors = [factor.to(vectors).repeat_interleave(place.row) for factor in each]
        result = vectors[0].mul_(factors[0]).addcmul_(vectors[1], factors[1])
    return tensors[0].add_(result) if params["weight"][0] is None else result


METHOD = Method(
    title="NuSLERP",
    merge=merge,
    params={
        "weight": Param(float, REQUIRED, "non_base"),
        "nuslerp_row_wise": Param(bool, False),
        "nuslerp_flatten": Param(bool, True),
    },
    inputs=(2, 2),
    base="optional",
    measure=measure,
    multiplies=True,
    rows=rows,
    paper="https://en.wikipedia.org/wiki/Slerp",
)

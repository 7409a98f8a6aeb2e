"""sce: select the elements that vary most, weight models by their energy, erase minority signs.

Source: Wan et al., "FuseChat: Knowledge fusion of chat models" (SCE), arXiv 2408.07990. In memory:
a slice of each model, and what `_spread` says while the elements that vary most are looked for.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from moeforge import kernels
from moeforge.methods import Method, Param, Params, Place, Scan
from moeforge.methods._spread import bounds, energies, farthest, matrix, selected
from moeforge.methods._sums import result_of
from moeforge.methods._task import majority, summed

if TYPE_CHECKING:
    from torch import Tensor

_TINY = 1e-6
"""A sum of energies, or of weights, below this counts as zero."""


def measure(params: Params, place: Place) -> Generator[Scan, list[Any], Any]:
    """Return the cut, or None for everything, and the weight of each model; none if nothing is cut.

    A model's weight is its share of the mean squares of what was selected.
    """
    share = params["select_topk"]
    if share < 1:
        cut, sums = yield from farthest(share, place)
    else:
        cut, sums = None, (yield from energies(None))
    means = [sum_ / max(place.numel, 1) for sum_ in sums]
    whole = sum(means)
    if abs(whole) < _TINY:
        return cut, tuple(1.0 / len(means) for _ in means)
    return cut, tuple(mean / whole for mean in means)


def merge(tensors: Tensor, params: Params, stats: tuple[Any, ...], place: Place) -> Tensor:
    """Return base + Σ wᵢ·δᵢ / Σ wᵢ over the models whose sign is that of Σ δ."""
    import torch

    cut, weights = stats
    if (values := matrix(tensors)) is not None:
        import numpy as np

        from moeforge.kernels.varying import sce

        out = result_of(values.shape[1], place)
        shares = np.array(weights, np.float32)
        limits = bounds(cut, place.start)
        sce(values, *limits, shares, np.float32(_TINY), kernels.matrix(out))
        return out
    base, parts = tensors[0], selected(tensors, cut, place.start)
    sign = majority(parts)
    agreeing = parts.mul_(sign).clamp_(min=0.0)
    weight = torch.tensor(weights, dtype=parts.dtype, device=parts.device)[:, None]
    result = summed(agreeing * weight)
    divisor = summed(agreeing.sign_().mul_(weight)).clamp_(min=_TINY)
    return result.mul_(sign.div_(divisor)).add_(base)


METHOD = Method(
    title="SCE",
    merge=merge,
    params={"select_topk": Param(float, 1.0), "int8_mask": Param(bool, False, unused=True)},
    inputs=(1, None),
    base="required",
    kernels=("differences", "varying"),
    measure=measure,
    paper="https://arxiv.org/abs/2408.07990",
)

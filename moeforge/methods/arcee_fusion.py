"""arcee_fusion: the other model where it differs importantly from the base, the base elsewhere.

In memory: rows of one block, and what `_select` says while the three quartiles are looked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeforge.methods import Measurement, Method, Params, Place
from moeforge.methods._select import cuts

if TYPE_CHECKING:
    from torch import Tensor


def importance(tensors: Tensor, place: Place) -> Tensor:
    """Return |x − base| times the divergence of its row, flat; zero or more.

    The divergence of a row is KL(softmax(x) ‖ softmax(base)), each probability 1e-8 larger so that
    none is zero. It is taken in float64: that of near models is less than the rounding of float32.
    """
    import torch

    base, other = tensors.reshape(2, -1, place.row)
    p, q = (rows.softmax(-1, dtype=torch.float64).add_(1e-8) for rows in (other, base))
    divergence = (p * (p / q).log_()).sum(-1, keepdim=True)
    # The divergence is zero or more, but for rounding.
    scale = divergence.clamp_(min=0.0).to(base.dtype)
    result: Tensor = (other - base).abs_().mul_(scale).flatten()
    return result


def measure(params: Params, place: Place) -> Measurement:
    """Return the importance from which on the other model counts: median + 1.5·(q₃ − q₁)."""
    ascending = [int(share * (place.numel - 1)) for share in (0.25, 0.5, 0.75)]
    counts = [place.numel - index for index in ascending]
    found = yield from cuts(lambda tensors, here: importance(tensors, here)[None], [counts], place)
    first, median, third = (cut.value for cut in found[0])
    return median + 1.5 * (third - first)


def merge(tensors: Tensor, params: Params, stats: float, place: Place) -> Tensor:
    """Return base + (x − base) where the importance reaches the threshold."""
    import torch

    weight = importance(tensors, place)
    kept = torch.ge(weight, stats, out=weight)
    base, other = tensors
    result: Tensor = base.addcmul_(other.sub_(base), kept)
    return result


METHOD = Method(
    title="Arcee Fusion",
    merge=merge,
    params={},
    inputs=(2, 2),
    base="required",
    measure=measure,
    rows=lambda params: True,
    paper="https://www.arcee.ai/blog/meet-mergekit-v0-1-arcee-fusion-expanded-model-support-multi-gpu-acceleration",
)

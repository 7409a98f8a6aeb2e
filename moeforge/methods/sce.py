"""sce: select the elements that vary most, weight models by their energy, erase minority signs.

Source: Wan et al., "FuseChat: Knowledge fusion of chat models" (SCE), arXiv 2408.07990. In memory:
a slice of each model, and what `_select` says while the threshold of the variances is looked for.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from moeforge import kernels
from moeforge.methods import Measurement, Method, Param, Params, Place, Scan
from moeforge.methods._cut import Cut
from moeforge.methods._select import cuts
from moeforge.methods._sums import blocks, result_of, total
from moeforge.methods._task import FEW, deltas, divided, majority, summed

if TYPE_CHECKING:
    from torch import Tensor

_TINY = 1e-6
"""A sum of energies, or of weights, below this counts as zero."""


def _matrix(tensors: Tensor) -> Any:
    """Return `tensors` for the kernels, or None; they add up few models only as torch does."""
    return kernels.matrix(tensors) if len(tensors) - 1 <= FEW else None


def _variances(tensors: Tensor) -> Tensor:
    """Return the variance of the differences from the first of `tensors` [inputs, elements]."""
    import torch

    if (matrix := _matrix(tensors)) is None:
        return variance(deltas(tensors))
    from moeforge.kernels.varying import variances

    out = torch.empty(matrix.shape[1])
    variances(matrix, out.numpy())
    return out


def variance(parts: Tensor) -> Tensor:
    """Return the population variance over models, element by element; parts [models, elements]."""
    mean = divided(summed(parts), len(parts))
    return divided(summed((parts - mean).square_()), len(parts))


def _find_cut(share: float, place: Place) -> Measurement:
    """Return the Cut of the elements that vary most: a share of those that vary at all."""
    import numpy as np

    def count(tensors: Tensor, here: Place) -> list[tuple[float, ...]]:
        if (matrix := _matrix(tensors)) is not None:
            from moeforge.kernels.varying import varied

            return [(float(varied(matrix)),)]
        found = _variances(tensors)
        if found.device.type == "cuda":
            return [(float(found.count_nonzero()),)]
        # Counting bools is several times faster than counting floats.
        return [(float(np.count_nonzero((found != 0.0).cpu().numpy())),)]

    (varying,) = yield from total(count)
    # In float32, as mergekit: of 100 elements a share of 0.29 is 29, not 28.
    wanted = int(np.float32(varying) * np.float32(max(share, 0.0)))
    found = yield from cuts(lambda t, here: _variances(t)[None], [[wanted]], place)
    return found[0][0]


def _selected(tensors: Tensor, cut: Cut | None, place: Place) -> Tensor:
    if cut is not None and (matrix := _matrix(tensors)) is not None:
        import numpy as np
        import torch

        from moeforge.kernels.varying import selected

        out = torch.empty(len(matrix) - 1, matrix.shape[1])
        selected(matrix, np.float32(cut.value), cut.last + 1 - place.start, out.numpy())
        return out
    parts = deltas(tensors)
    return parts if cut is None else parts.mul_(cut(variance(parts), place.start))


def measure(params: Params, place: Place) -> Generator[Scan, list[Any], Any]:
    """Return the cut, or None for everything, and the weight of each model.

    A model's weight is its share of the mean squares of what was selected.
    """
    share = params["select_topk"]
    cut = (yield from _find_cut(share, place)) if share < 1 else None

    def squares(tensors: Tensor, here: Place) -> list[tuple[float, ...]]:
        parts = _selected(tensors, cut, here)
        if parts.device.type == "cuda":
            from moeforge.methods._gpu import block_sums

            return [tuple(block) for block in block_sums(parts.square()).T.tolist()]
        found = blocks(parts)
        return [tuple(block.square().sum(1).tolist()) for block in found]

    energies = [sum_ / max(place.numel, 1) for sum_ in (yield from total(squares))]
    whole = sum(energies)
    if abs(whole) < _TINY:
        return cut, tuple(1.0 / len(energies) for _ in energies)
    return cut, tuple(energy / whole for energy in energies)


def merge(tensors: Tensor, params: Params, stats: tuple[Any, ...], place: Place) -> Tensor:
    """Return base + Σ wᵢ·δᵢ / Σ wᵢ over the models whose sign is that of Σ δ."""
    import torch

    cut, weights = stats
    if (matrix := _matrix(tensors)) is not None:
        import numpy as np

        from moeforge.kernels.varying import sce

        out = result_of(matrix.shape[1], place)
        limits = (np.float32(cut.value), cut.last + 1 - place.start) if cut else (np.float32(0), 0)
        shares = np.array(weights, np.float32)
        sce(matrix, *limits, shares, np.float32(_TINY), cut is None, kernels.matrix(out))
        return out
    base, parts = tensors[0], _selected(tensors, cut, place)
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

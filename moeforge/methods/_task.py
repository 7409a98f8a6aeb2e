"""Owns task arithmetic: sparsified, weighted differences from a base, summed and added to it.

Source: Ilharco et al., "Editing models with task arithmetic", arXiv 2212.04089; the election of
signs is that of Yadav et al., "TIES-Merging", arXiv 2306.01708. Details follow mergekit, so that
its recipes mean the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeforge.methods import REQUIRED, Measurement, Method, Param, Params, Place
from moeforge.methods._sums import absolute, total

if TYPE_CHECKING:
    from torch import Tensor

Sparsify = Callable[[int, "Tensor", Params, Any, Place], None]
"""(index among the models that are not the base, delta, params, what `find` returned, place): sets
small or unlucky elements of the delta to zero."""
Find = Callable[[Params, Place], Measurement]


@dataclass(frozen=True)
class Stats:
    """What is known of whole tensors.

    Attributes:
        found: what the sparsifier must know, such as thresholds.
        factors: for each delta, what its kept elements are multiplied with.
    """

    found: Any
    factors: tuple[float, ...]


_TINY = 1e-7
"""Sums of magnitudes below this are not rescaled, as in mergekit."""


def densities(params: Params) -> tuple[float, ...]:
    """Return the density of each model that is not the base."""
    return tuple(params["density"][1:])


def deltas(tensors: Tensor) -> Tensor:
    """Return the differences from the first of `tensors` [inputs, elements], in their memory."""
    return tensors[1:].sub_(tensors[0])


def added(parts: Tensor) -> Tensor:
    """Return the sum of `parts` [models, elements], in memory of its own."""
    if len(parts) == 1:
        return parts[0].clone()
    result = parts[0] + parts[1]
    for part in parts[2:]:  # faster than a reduction over the first dimension
        result.add_(part)
    return result


_TINIEST = 2.0**-126
"""The smallest normal float32: it decides the sign of a sum only where that is zero."""


def majority(parts: Tensor) -> Tensor:
    """Return the sign of the sum of `parts` [models, elements], 1 or −1; 1 where it is zero."""
    # In floats throughout: comparisons into bools and selections by them are far slower.
    return added(parts).add_(_TINIEST).sign_()


def elect(parts: Tensor, weights: Sequence[float], *, normalize: bool) -> Tensor:
    """Return the sum of those of `parts` that have the sign of their sum, element by element.

    With `normalize` it is divided by the sum of the weights of the parts that take part. Overwrites
    `parts` [models, elements].
    """
    import torch

    sign = majority(parts)
    agreeing = parts.mul_(sign).clamp_(min=0.0)
    result = added(agreeing)
    if not normalize:
        return result.mul_(sign)
    taking = agreeing.sign_()
    if len(set(weights)) == 1:
        # Where nobody takes part the result is zero, whatever it is divided by.
        divisor = added(taking).clamp_(min=1.0)
        if weights[0] != 1.0:
            divisor.mul_(weights[0])
    else:
        weight = torch.tensor(weights, dtype=parts.dtype, device=parts.device)[:, None]
        divisor = added(taking.mul_(weight))
        divisor.add_(torch.eq(divisor, 0.0, out=torch.empty_like(divisor)))
    return result.mul_(sign.div_(divisor))


def _sum(parts: Tensor, weights: Sequence[float], *, normalize: bool) -> Tensor:
    result = added(parts)
    divisor = sum(weights)
    return result.div_(divisor) if normalize and abs(divisor) >= 1e-8 else result


def _keep(index: int, delta: Tensor, params: Params, found: Any, place: Place) -> None:
    """Leave the delta as it is."""


def _nothing(params: Params, place: Place) -> Measurement:
    return None
    yield  # a generator without scans


def task_method(
    title: str,
    paper: str,
    *,
    sparsify: Sparsify = _keep,
    find: Find = _nothing,
    consensus: bool = False,
    normalize: bool = False,
    rescale: bool = False,
    rows: bool = False,
    random: bool = False,
    more: Mapping[str, Param] | None = None,
    check: Callable[[Params], str] | None = None,
) -> Method:
    """Return a method of the task arithmetic family.

    Args:
        title: name for people.
        paper: where it comes from.
        sparsify: what becomes of a delta whose density is below one.
        find: what the sparsifier must know first.
        consensus: elect signs.
        normalize: default of the parameter: divide by the sum of weights.
        rescale: default of the parameter: give the kept elements the L1 norm of all.
        rows: whether the sparsifier needs whole rows.
        random: whether it draws.
        more: parameters beyond those of the family.
        check: as in Method.
    """

    def sparsified(parts: Tensor, params: Params, found: Any, place: Place) -> Tensor:
        for i, share in enumerate(densities(params)):
            if share < 1:
                sparsify(i, parts[i], params, found, place)
        return parts

    def measure(params: Params, place: Place) -> Measurement:
        shares = densities(params)
        found = (yield from find(params, place)) if any(s < 1 for s in shares) else None
        factors = [1.0] * len(shares)
        if params["rescale"] and sparsify is not _keep and any(0 < s < 1 for s in shares):

            def look(tensors: Tensor, here: Place) -> list[tuple[float, ...]]:
                parts = deltas(tensors)
                whole = absolute(parts)
                kept = absolute(sparsified(parts, params, found, here))
                return [(*a, *b) for a, b in zip(whole, kept, strict=True)]

            sums = yield from total(look)
            whole, kept = sums[: len(shares)], sums[len(shares) :]
            factors = [
                a / b if a >= _TINY and b >= _TINY else 1.0
                for a, b in zip(whole, kept, strict=True)
            ]
        return Stats(found, tuple(factors))

    def merge(tensors: Tensor, params: Params, stats: Stats, place: Place) -> Tensor:
        weights = params["weight"][1:]
        parts = sparsified(deltas(tensors), params, stats.found, place)
        for part, weight, factor in zip(parts, weights, stats.factors, strict=True):
            if weight * factor != 1.0:
                part.mul_(weight * factor)
        combine = elect if consensus else _sum
        result = combine(parts, weights, normalize=params["normalize"])
        return tensors[0].add_(result, alpha=params["lambda"])

    return Method(
        title=title,
        merge=merge,
        params={
            "weight": Param(float, REQUIRED, "non_base"),
            "density": Param(float, 1.0, "non_base", unused=sparsify is _keep),
            **(more or {}),
            "normalize": Param(bool, normalize),
            "rescale": Param(bool, rescale, unused=sparsify is _keep),
            "lambda": Param(float, 1.0),
            "int8_mask": Param(bool, False, unused=True),
        },
        inputs=(1, None),
        base="required",
        measure=measure,
        rows=lambda params: rows and any(share < 1 for share in densities(params)),
        random=random,
        check=check,
        paper=paper,
    )

"""Owns task arithmetic: sparsified, weighted differences from a base, summed and added to it.

Source: Ilharco et al., "Editing models with task arithmetic", arXiv 2212.04089; the election of
signs is that of Yadav et al., "TIES-Merging", arXiv 2306.01708. Details follow mergekit, so that
its recipes mean the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moeforge import kernels
from moeforge.methods import (
    HELD,
    PADDING,
    REQUIRED,
    Measurement,
    Method,
    Param,
    Params,
    Place,
    Scan,
)
from moeforge.methods._sums import absolute, add_up

if TYPE_CHECKING:
    from torch import Tensor

    from moeforge.methods._cut import Cut

Sparsify = Callable[[int, "Tensor", Params, Any, Place], None]
"""(index among the models that are not the base, delta, params, what `find` returned, place): sets
small or unlucky elements of the delta to zero."""
Chances = Callable[[Params], tuple[Any, Any]]
"""What kernels draw by where `Sparsify` keeps elements by chance alone, for each model but the
base: a key, uint64, and a limit below which draws are kept, int32."""
Find = Callable[[Params, Place], Measurement]
Bounds = Callable[[int, Any, Place], "tuple[Cut | None, Cut | None]"]
"""(index among the models that are not the base, what `find` returned, place): the cut below which
elements become zero, and that above which they do; None for no such cut."""
Kept = dict[tuple[int, int], Any]
"""Which elements are kept: bits [models, elements / 8], by start and length of the slice."""
Thinned = Callable[[Any, Params, Place], "tuple[list[Any], Kept] | None"]
"""(base and models as kernels take them, params with densities above zero, place): for each block
Σ|x| of the deltas, then of what `Sparsify` keeps of them; and what that is. None where kernels
cannot find it."""


@dataclass(frozen=True)
class Stats:
    """What is known of whole tensors.

    Attributes:
        found: what the sparsifier must know, such as thresholds.
        factors: for each delta, what its kept elements are multiplied with.
        kept: which elements of the deltas are kept; of slices that are not there it is found out
            again.
        ready: what the kernel is handed for every slice, once it is known.
    """

    found: Any
    factors: tuple[float, ...]
    kept: Kept = field(default_factory=dict)
    ready: list[Any] = field(default_factory=list)


_TINY = 1e-7
"""Sums of magnitudes below this are not rescaled, as in mergekit."""


LEAST = 1e-8
"""Sums of weights smaller than this are not divided by, as in mergekit."""


def densities(params: Params) -> tuple[float, ...]:
    """Return the density of each model that is not the base."""
    return tuple(params["density"][1:])


def deltas(tensors: Tensor) -> Tensor:
    """Return the differences from the first of `tensors` [inputs, elements].

    In their memory, or in float32 in memory of its own where they are stored in bfloat16.
    """
    import torch

    if tensors.dtype == torch.bfloat16:
        from moeforge.kernels.differences import deltas as compiled

        # Rows a power of two apart would share the same few lines of the cache.
        parts = torch.empty(len(tensors) - 1, tensors.shape[1] + PADDING)
        compiled(kernels.matrix(tensors), parts.numpy())
        return parts[:, : tensors.shape[1]]
    return tensors[1:].sub_(tensors[0])


def added(parts: Tensor) -> Tensor:
    """Return the sum of `parts` [models, elements], in memory of its own."""
    if len(parts) == 1:
        return parts[0].clone()
    result = parts[0] + parts[1]
    for part in parts[2:]:  # faster than a reduction over the first dimension
        result.add_(part)
    return result


def divided(values: Tensor, by: float) -> Tensor:
    """Return `values` divided by a number, in their memory, rounded once."""
    import torch

    # By a number a GPU would not divide: it multiplies by the reciprocal, which is rounded already.
    return values.div_(torch.full((), by, dtype=values.dtype, device=values.device))


FEW = 4
"""Parts up to which torch adds up the first dimension in their order, in every element."""


def summed(parts: Tensor) -> Tensor:
    """Return what parts.sum(0) gives, to the bit, several times faster for few parts."""
    # Zeros that are all negative have a positive sum there.
    return added(parts).add_(0.0) if len(parts) <= FEW else parts.sum(0)


def majority(parts: Tensor) -> Tensor:
    """Return the sign of the sum of `parts` [models, elements], 1 or −1; 1 where it is zero."""
    import torch

    # In floats throughout: comparisons into bools and selections by them are far slower.
    total = added(parts).add_(0.0)  # no zero is negative then
    one = torch.ones((), dtype=total.dtype, device=total.device)
    return torch.copysign(one, total, out=total)


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
    return divided(result, divisor) if normalize and abs(divisor) >= LEAST else result


def _keep(index: int, delta: Tensor, params: Params, found: Any, place: Place) -> None:
    """Leave the delta as it is."""


def keep(delta: Tensor, kept: Any) -> None:
    """Multiply a delta, on the CPU, in place with a numpy array of bools of its shape."""
    import numpy as np

    values = delta.numpy()
    if kernels.loaded() and values.dtype == np.float32:
        from moeforge.kernels.drawing import keep as compiled

        compiled(values, kept.view(np.uint8))
        return
    np.multiply(values, kept, out=values)


def _packed(parts: Tensor, place: Place) -> Kept:
    """Return which of `parts` are not zero, where it lies in this machine's memory."""
    import numpy as np

    if parts.device.type != "cpu":
        return {}
    return {(place.start, parts.shape[1]): np.packbits(parts.numpy() != 0, axis=1)}


def _keep_packed(parts: Tensor, bits: Any) -> None:
    import numpy as np

    for part, row in zip(parts, bits, strict=True):
        # Multiplied as the draws themselves are: what is dropped keeps its sign.
        keep(part, np.unpackbits(row, count=len(part)).view(np.bool_))


def _no_bounds(index: int, found: Any, place: Place) -> tuple[Cut | None, Cut | None]:
    return None, None


def _nothing(params: Params, place: Place) -> Measurement:
    return None
    yield  # a generator without scans


def task_method(
    title: str,
    paper: str,
    *,
    sparsify: Sparsify = _keep,
    chances: Chances | None = None,
    thinned: Thinned | None = None,
    find: Find = _nothing,
    bounds: Bounds | None = None,
    consensus: bool = False,
    normalize: bool = False,
    rescale: bool = False,
    rows: bool = False,
    more: Mapping[str, Param] | None = None,
    check: Callable[[Params], str] | None = None,
) -> Method:
    """Return a method of the task arithmetic family.

    Args:
        title: name for people.
        paper: where it comes from.
        sparsify: what becomes of a delta whose density is below one.
        chances: by what kernels draw, if the sparsifier draws and asks for no more than chances.
        thinned: how kernels find what a sparsifier keeps that draws and asks for more.
        find: what the sparsifier must know first.
        bounds: what the sparsifier does, as cuts; None if it does it otherwise.
        consensus: elect signs.
        normalize: default of the parameter: divide by the sum of weights.
        rescale: default of the parameter: give the kept elements the L1 norm of all.
        rows: whether the sparsifier needs whole rows.
        more: parameters beyond those of the family.
        check: as in Method.
    """
    drawing = (("drawing",) if chances else ()) + (("drawing", "thinning") if thinned else ())

    def sparsified(parts: Tensor, params: Params, found: Any, place: Place) -> Tensor:
        for i, share in enumerate(densities(params)):
            if share < 1:
                sparsify(i, parts[i], params, found, place)
        return parts

    def measure(params: Params, place: Place) -> Measurement:
        shares = densities(params)
        found = (yield from find(params, place)) if any(s < 1 for s in shares) else None
        factors, choices = [1.0] * len(shares), Kept()
        if params["rescale"] and sparsify is not _keep and any(0 < s < 1 for s in shares):
            # What is drawn costs more than to hold it; a model that keeps nothing draws nothing.
            fits = min(shares) > 0 and len(shares) * place.numel <= HELD
            holds = fits and (chances is not None or thinned is not None)
            drawn = chances(params) if chances is not None else None

            def sums_of(parts: Tensor, here: Place) -> list[list[float]]:
                if not rows or parts.device.type != "cpu":
                    return absolute(parts)
                groups = parts.split(here.group, 1)  # type: ignore[no-untyped-call]
                return [line for group in groups for line in absolute(group)]

            def look(tensors: Tensor, here: Place) -> tuple[list[tuple[float, ...]], Kept]:
                matrix = kernels.matrix(tensors)
                if drawn is not None and matrix is not None:
                    from moeforge.methods._compiled import sums_drawn

                    return sums_drawn(matrix, here, drawn), {}
                if holds and thinned is not None and matrix is not None:
                    result = thinned(matrix, params, here)
                    if result is not None:
                        return result
                parts = deltas(tensors)
                whole = sums_of(parts, here)
                kept = sums_of(sparsified(parts, params, found, here), here)
                sums = [(*a, *b) for a, b in zip(whole, kept, strict=True)]
                return sums, _packed(parts, here) if holds else {}

            def join(pieces: list[tuple[list[tuple[float, ...]], Kept]]) -> Any:
                bits = {key: value for _, kept in pieces for key, value in kept.items()}
                return add_up(line for lines, _ in pieces for line in lines), bits

            chunks = yield Scan(look, join)
            sums = add_up(line for line, _ in chunks)
            choices = {key: value for _, kept in chunks for key, value in kept.items()}
            whole, kept = sums[: len(shares)], sums[len(shares) :]
            factors = [
                a / b if a >= _TINY and b >= _TINY else 1.0
                for a, b in zip(whole, kept, strict=True)
            ]
        return Stats(found, tuple(factors), choices)

    def merge(tensors: Tensor, params: Params, stats: Stats, place: Place) -> Tensor:
        weights = params["weight"][1:]
        bits = stats.kept.get((place.start, tensors.shape[1]))
        known = bits is not None or bounds is not None or chances is not None
        known = known or sparsify is _keep or min(densities(params)) >= 1
        if known and (matrix := kernels.matrix(tensors)) is not None:
            by = bounds if bits is None and bounds is not None else _no_bounds
            from moeforge.methods._compiled import merged

            return merged(
                *(matrix, params, stats, place),
                bounds=by,
                bits=bits,
                chances=chances,
                consensus=consensus,
            )
        parts, base = deltas(tensors), tensors[0]
        if bits is not None:
            _keep_packed(parts, bits)
        else:
            sparsified(parts, params, stats.found, place)
        for part, weight, factor in zip(parts, weights, stats.factors, strict=True):
            if weight * factor != 1.0:
                part.mul_(weight * factor)
        combine = elect if consensus else _sum
        result = combine(parts, weights, normalize=params["normalize"])
        if params["lambda"] != 1.0:  # rounded before it is added, whatever the processor
            result.mul_(params["lambda"])
        return result.add_(base)

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
        kernels=("differences", *drawing),
        measure=measure,
        grouped=rows,
        rows=lambda params: rows and any(share < 1 for share in densities(params)),
        random=bool(drawing),
        check=check,
        paper=paper,
    )

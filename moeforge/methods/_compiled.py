"""Owns handing slices of task arithmetic to its kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeforge import kernels
from moeforge.methods import Params, Place
from moeforge.methods._sums import result_of
from moeforge.methods._task import LEAST, Bounds, Stats, densities

if TYPE_CHECKING:
    from torch import Tensor


def merged(
    matrix: Any,
    params: Params,
    stats: Stats,
    place: Place,
    *,
    bounds: Bounds,
    bits: Any,
    consensus: bool,
) -> Tensor:
    """Return what `merge` returns, by the compiled kernel.

    Args:
        matrix: base and models, as `kernels.matrix` gives them.
        params: the method's.
        stats: as of `merge`.
        place: where the elements lie.
        bounds: the sparsifier's.
        bits: which elements are kept, packed; or None.
        consensus: elect signs.
    """
    import numpy as np

    from moeforge.kernels.differences import task

    count = matrix.shape[1]
    if not stats.ready:
        stats.ready.append(_ready(params, stats, place, bounds, consensus=consensus))
    lasts, values, more = stats.ready[0]
    kept = np.empty((0, 0), np.uint8) if bits is None else np.unpackbits(bits, 1, count)
    out = result_of(count, place)
    task(matrix, lasts + (1 - place.start), values, kept, *more, kernels.matrix(out))
    return out


def _ready(
    params: Params, stats: Stats, place: Place, bounds: Bounds, *, consensus: bool
) -> tuple[Any, ...]:
    """Return the last elements that belong to cuts, and all other arguments of the kernel."""
    import numpy as np

    weights, divisor = params["weight"][1:], sum(params["weight"][1:])
    divides = params["normalize"] and abs(divisor) >= LEAST
    lasts = np.full((len(weights), 2), -1, np.int64)
    values = np.empty((len(weights), 2, 2), np.float32)
    values[:, 0], values[:, 1] = -1.0, np.inf
    sparse = False
    for i, share in enumerate(densities(params)):
        cuts = bounds(i, stats.found, place) if share < 1 else (None, None)
        sparse = sparse or cuts[0] is not None
        for which, cut in enumerate(cuts):
            if cut is not None:
                lasts[i, which] = cut.last
                # Up to the last an element as large as the value belongs, beyond it it does not.
                below = np.nextafter(np.float32(cut.value), np.float32(0.0)) if cut.value else -1.0
                values[i, which] = below, cut.value
    return (
        lasts,
        values,
        (
            sparse,
            np.array([w * f for w, f in zip(weights, stats.factors, strict=True)], np.float32),
            *(np.array(weights, np.float32), consensus, bool(params["normalize"])),
            len(set(weights)) == 1,
            np.float32(1.0 if consensus or not divides else divisor),
            np.float32(params["lambda"]),
        ),
    )

"""Owns handing slices of task arithmetic to its kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeforge import kernels
from moeforge.methods import BLOCK, Params, Place
from moeforge.methods._sums import result_of, sums_for
from moeforge.methods._task import LEAST, Bounds, Chances, Stats, densities

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
    chances: Chances | None,
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
        chances: of the sparsifier, if it draws element by element.
        consensus: elect signs.
    """
    import numpy as np

    from moeforge.kernels.differences import task

    count = matrix.shape[1]
    if not stats.ready:
        drawn = (np.empty(0, np.uint64), np.empty(0, np.int32))
        drawn = drawn if chances is None else chances(params)
        ready = _ready(params, stats, place, bounds, consensus=consensus)
        stats.ready.append((*ready, drawn))
    lasts, values, more, drawn = stats.ready[0]
    kept = np.empty((0, 0), np.uint8) if bits is None else bits
    out = result_of(count, place)
    borders = lasts + (1 - place.start)
    task(*(matrix, borders, values, kept, place.start, *drawn, *more, kernels.matrix(out)))
    return out


def sums_drawn(matrix: Any, place: Place, drawn: tuple[Any, Any]) -> list[tuple[float, ...]]:
    """Return, of each block, Σ|x| of the deltas, then of what is kept of them.

    Args:
        matrix: base and models, as `kernels.matrix` gives them.
        place: where the elements lie.
        drawn: what `Chances` give.
    """
    from moeforge.kernels.drawing import thinned as compiled

    sums = sums_for(matrix, 2 * (len(matrix) - 1))
    compiled(matrix, place.start, *drawn, BLOCK, sums.reshape(len(sums), 2, -1))
    return sums.tolist()  # type: ignore[no-any-return]


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

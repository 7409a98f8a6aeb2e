"""Owns DELLA's thinning: within each row, the larger a delta the likelier it is kept.

Source: Deep et al., "DELLA-Merging", arXiv 2406.11617. In memory: the rows of one block, as keys of
eight bytes, and their sorted copy; only rows are sorted, never a tensor. Compiled, long ones are
not sorted at all: see `kernels.ranking`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from moeforge import kernels
from moeforge.methods import Params, Place
from moeforge.methods._random import derive, draws, keys_of
from moeforge.methods._task import Kept, densities, keep

if TYPE_CHECKING:
    from torch import Tensor


_SHORT, _LONG = 2**8, 2**16
"""Elements of rows that kernels choose among: shorter ones are sorted faster, numbers of longer
ones do not fit into 16 bits."""


def check(params: Params) -> str:
    """Refuse probabilities outside of 0 to 1, and those that fall with magnitude."""
    for density, epsilon in zip(densities(params), params["epsilon"][1:], strict=True):
        if 0 < density < 1 and not (0 <= epsilon < density < 1 - epsilon):
            more = "" if epsilon >= 0 else ", and epsilon 0 or more"
            found = f"{density} ± {epsilon}"
            return f"density ± epsilon must be above 0 and below 1{more}, here {found}"
    return ""


def _bounds(density: float, epsilon: float, row: int) -> Any:
    """Return for each rank, from 0, below which draws of 16 bits an element is kept: int64 [row].

    As unsigned numbers. An element of rank r among n is kept with probability
    density − ε + 2ε·r/(n−1).
    """
    import numpy as np

    span = 2 * epsilon / (row - 1) if row > 1 else 0.0
    lowest = density - epsilon if row > 1 else density
    return np.round((lowest + span * np.arange(row)) * 2**16).astype(np.int64)


@lru_cache(maxsize=64)
def _ranks_needed(density: float, epsilon: float, row: int) -> tuple[int, int, Any]:
    """Return for each draw of 16 bits the rank (from 0) from which on an element is kept.

    Draws below a first bound keep any rank, and from a second bound on none: the bounds, and an
    array [2¹⁶] of int32 with the ranks, all by draws as unsigned numbers.
    """
    import numpy as np

    bounds = _bounds(density, epsilon, row)
    needed = np.searchsorted(bounds, np.arange(2**16), side="right").astype(np.int32)
    return int(bounds[0]), int(bounds[-1]), needed


@lru_cache(maxsize=64)
def _narrow(
    shares: tuple[float, ...], epsilons: tuple[float, ...], row: int
) -> tuple[Any, Any] | None:
    """Return bounds as kernels take them, uint16 [deltas, row], and which deltas have none.

    None where there are deltas, or rows, for which it cannot be done.
    """
    import numpy as np

    if not _SHORT <= row < _LONG:
        return None
    bounds, whole = np.zeros((len(shares), row), np.int64), np.array(shares) >= 1
    for i, (share, epsilon) in enumerate(zip(shares, epsilons, strict=True)):
        if share < 1:
            bounds[i] = _bounds(share, epsilon, row)
    return (bounds.astype(np.uint16), whole) if bounds.max() < 2**16 else None


def thin_by_rank(index: int, delta: Tensor, params: Params, found: Any, place: Place) -> None:
    """Set elements of whole rows to zero, the likelier the smaller they are in their row.

    Ranks go by magnitude in float32; equal magnitudes rank by position. A row of one element is
    kept with probability `density`.
    """
    density, epsilon = densities(params)[index], params["epsilon"][index + 1]
    if density <= 0:
        delta.zero_()
        return
    if delta.device.type == "cuda":
        import torch

        row, key = place.row, derive(params["key"], index)

        from moeforge.methods._gpu import draws as drawn_there
        from moeforge.methods._gpu import thin

        drawn = drawn_there(key, place.start, delta.numel(), delta.device)
        surely, maybe, needed = _ranks_needed(density, epsilon, row)
        thin(delta, row, drawn, surely, maybe, torch.from_numpy(needed))
        return
    keep(delta, large(index, delta.abs(), params, place))


def large(index: int, magnitudes: Tensor, params: Params, place: Place) -> Any:
    """Return which elements `thin_by_rank` keeps: a numpy array of bools.

    Args:
        index: of a delta whose density is above zero.
        magnitudes: of whole rows of it.
        params: the method's.
        place: where they lie.
    """
    import numpy as np

    density, epsilon = densities(params)[index], params["epsilon"][index + 1]
    row, values = place.row, magnitudes.float().cpu().numpy()
    drawn = draws(derive(params["key"], index), place.start, values.size)
    narrow = _narrow((density,), (epsilon,), row) if kernels.loaded() else None
    if narrow is not None:
        from moeforge.kernels.ranking import choose

        found = np.empty(values.size, np.uint8)
        choose(values.view(np.uint32), row, drawn, narrow[0][0], found)
        return found.view(np.bool_)
    surely, maybe, needed = _ranks_needed(density, epsilon, row)
    bits = values.view(np.int32).reshape(-1, row)
    # One key per element, in the order of magnitude and then of position.
    keys = bits.astype(np.int64)
    keys <<= 32
    keys |= np.arange(row, dtype=np.int64)
    ordered = np.sort(keys, axis=1).reshape(-1)
    kept = drawn < surely - 2**15
    # Of most elements the draw alone decides; only of the others the rank is looked at.
    open_ = np.flatnonzero((drawn < maybe - 2**15) ^ kept)
    ranks = needed.take(drawn.take(open_).astype(np.int64) + 2**15)
    kept[open_] = keys.reshape(-1).take(open_) >= ordered.take(open_ // row * row + ranks)
    return kept


def thinned(matrix: Any, params: Params, place: Place) -> tuple[list[Any], Kept] | None:
    """Return, of each block, Σ|x| of the deltas, then of what is kept of them; and what that is.

    None where kernels do not choose among rows of this length, or by these chances.

    Args:
        matrix: base and models, as `kernels.matrix` gives them; whole rows.
        params: the method's, with densities above zero.
        place: where the elements lie.
    """
    import numpy as np

    shares, count = densities(params), matrix.shape[1]
    narrow = _narrow(shares, tuple(params["epsilon"][1:]), place.row)
    if narrow is None:
        return None
    from moeforge.kernels.thinning import thinned as compiled

    sums = np.empty((2, len(shares)))
    bits = np.empty((len(shares), -(-count // 8)), np.uint8)
    drawn = keys_of(params["key"], len(shares))
    compiled(matrix, place.row, place.start, drawn, *narrow, sums, bits)
    return [sums.flatten().tolist()], {(place.start, count): bits}

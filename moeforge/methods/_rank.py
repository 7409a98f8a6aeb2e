"""Owns DELLA's thinning: within each row, the larger a delta the likelier it is kept.

Source: Deep et al., "DELLA-Merging", arXiv 2406.11617. In memory: the rows of one slice, as keys of
eight bytes, and their magnitudes; only rows are sorted, never a tensor. Compiled, long ones are
not sorted at all: see `kernels.ranking`. Ranks go by magnitude in float32; equal magnitudes, of
which differences of half-precision numbers have many, share the mean of theirs.
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


@lru_cache(maxsize=64)
def _bounds(density: float, epsilon: float, row: int) -> Any:
    """Return below which draws of 16 bits keep elements, as unsigned numbers: int64 [2·row − 1].

    Of rank r, from 0, among n they are kept with probability density − ε + 2ε·r/(n−1). The ranks of
    equal ones are first, …, last; r is their mean, and (first + last) the number of their bound.
    """
    import numpy as np

    if row == 1:
        return np.round(np.array([density]) * 2**16).astype(np.int64)
    ranks = np.arange(2 * row - 1) / 2
    return np.round((density - epsilon + 2 * epsilon / (row - 1) * ranks) * 2**16).astype(np.int64)


@lru_cache(maxsize=64)
def _narrow(
    shares: tuple[float, ...], epsilons: tuple[float, ...], row: int
) -> tuple[Any, Any] | None:
    """Return bounds as kernels take them, uint16 [deltas, 2·row − 1], and which deltas have none.

    None where there are deltas, or rows, for which it cannot be done.
    """
    import numpy as np

    if not _SHORT <= row < _LONG:
        return None
    bounds, whole = np.zeros((len(shares), 2 * row - 1), np.int64), np.array(shares) >= 1
    for i, (share, epsilon) in enumerate(zip(shares, epsilons, strict=True)):
        if share < 1:
            bounds[i] = _bounds(share, epsilon, row)
    return (bounds.astype(np.uint16), whole) if bounds.max() < 2**16 else None


def thin_by_rank(index: int, delta: Tensor, params: Params, found: Any, place: Place) -> None:
    """Set elements of whole rows to zero, the likelier the smaller they are in their row.

    A row of one element is kept with probability `density`.
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
        thin(delta, drawn, torch.from_numpy(_bounds(density, epsilon, row)))
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
    # One key per element, in the order of magnitude and then of position.
    keys = values.view(np.int32).astype(np.int64)
    keys <<= 32
    keys |= np.arange(keys.size)
    keys.reshape(-1, row).sort(axis=1)
    upper, new = keys >> 32, np.ones(keys.size, np.bool_)
    np.not_equal(upper[1:], upper[:-1], out=new[1:])
    new[::row] = True
    groups = np.flatnonzero(new)  # of equal ones in a row, by the first's place
    sizes = np.diff(groups, append=keys.size)
    bounds = _bounds(density, epsilon, row).take(2 * (groups % row) + sizes - 1) - 2**15
    keys &= 2**32 - 1
    limits = np.empty(keys.size, np.int32)
    limits[keys] = bounds.astype(np.int32).repeat(sizes)
    return drawn < limits


def thinned(matrix: Any, params: Params, place: Place) -> tuple[list[Any], Kept] | None:
    """Return, of each group, Σ|x| of the deltas, then of what is kept of them; and what that is.

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

    sums = np.zeros((max(-(-count // place.group), 1), 2, len(shares)))
    bits = np.empty((len(shares), -(-count // 8)), np.uint8)
    drawn = keys_of(params["key"], len(shares))
    compiled(matrix, place.row, place.group, place.start, drawn, *narrow, sums, bits)
    return sums.reshape(len(sums), -1).tolist(), {(place.start, count): bits}

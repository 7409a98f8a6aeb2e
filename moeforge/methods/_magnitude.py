"""Owns sparsifying by magnitude: which deltas of a tensor are the large ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from moeforge import kernels
from moeforge.methods import Measurement, Params, Place
from moeforge.methods._cut import Cut
from moeforge.methods._select import Compiled, cuts
from moeforge.methods._task import deltas, densities

if TYPE_CHECKING:
    from torch import Tensor

_rooms: list[Any] = []
"""Memory that is collected in, kept from slice to slice: new one would be cleared page by page."""


def find_cuts(
    params: Params, place: Place, wanted: Callable[[int, int], Sequence[int]]
) -> Measurement:
    """Return the cuts of each delta whose density is below one, by its index.

    Args:
        params: with the densities.
        place: shape of the whole tensor.
        wanted: (index of the delta, number of elements) -> how many of the largest to tell apart.
    """
    sparse = [i for i, share in enumerate(densities(params)) if share < 1]

    def magnitudes(tensors: Tensor, here: Place) -> Tensor:
        if (matrix := kernels.matrix(tensors)) is not None:
            import numpy as np
            import torch

            from moeforge.kernels.counting import magnitudes as compiled

            found = torch.empty(len(sparse), matrix.shape[1])
            compiled(matrix, np.array(sparse, np.int64) + 1, found.numpy())
            return found
        parts = deltas(tensors).abs_()
        return parts if len(sparse) == len(parts) else parts[sparse]

    def tally(tensors: Tensor, quantities: Sequence[int], limits: Any) -> Any:
        if (matrix := kernels.matrix(tensors)) is None:
            return None
        import numpy as np

        from moeforge.kernels.counting import ROOM, tallies

        shape = (len(quantities), matrix.shape[1] + ROOM)
        try:
            room = _rooms.pop()
        except IndexError:
            room = np.empty(0, np.float32)
        if room.size < prod(shape):
            room = np.empty(prod(shape), np.float32)
        found, rows = np.empty((len(quantities), 4), np.int64), room[: prod(shape)].reshape(shape)
        tallies(matrix, np.array(sparse, np.int64)[quantities] + 1, limits, rows, found)
        lines = found.tolist()
        inside = [row[: line[3]].copy() for row, line in zip(rows, lines, strict=True)]
        _rooms.append(room)
        return [tuple(line[:3]) for line in lines], inside

    def where(tensors: Tensor, quantity: int, value: float) -> Any:
        if (matrix := kernels.matrix(tensors)) is None:
            return None
        import numpy as np

        from moeforge.kernels.counting import where as compiled

        return compiled(matrix, sparse[quantity] + 1, np.float32(value))

    counts = [wanted(i, place.numel) for i in sparse]
    found = yield from cuts(magnitudes, counts, place, Compiled(tally, where))
    return dict(zip(sparse, found, strict=True))


def trim(index: int, delta: Tensor, params: Params, found: Any, place: Place) -> None:
    """Keep the largest share `density` of a delta; at least one element if it is above zero."""
    (cut,) = found[index]
    cut.trim(delta, place.start)


def small(index: int, found: Any, place: Place) -> tuple[Cut | None, Cut | None]:
    """Return the cut of `trim`."""
    return found[index][0], None


def window(index: int, found: Any, place: Place) -> tuple[Cut | None, Cut | None]:
    """Return the two cuts of `drop_outliers`."""
    inner, outer = found[index]
    return inner, outer


def find_largest(params: Params, place: Place) -> Measurement:
    """Return the cut of each sparse delta for `trim`."""

    def wanted(index: int, numel: int) -> list[int]:
        density = densities(params)[index]
        return [max(1, int(density * numel)) if density > 0 else 0]

    return (yield from find_cuts(params, place, wanted))


def drop_outliers(index: int, delta: Tensor, params: Params, found: Any, place: Place) -> None:
    """Keep a share `density` of a delta below its largest share `gamma`."""
    inner, outer = found[index]
    inner.trim(delta, place.start)
    outliers = delta.clone()
    outer.trim(outliers, place.start)
    delta.sub_(outliers)


def find_window(params: Params, place: Place) -> Measurement:
    """Return the two cuts of each sparse delta for `drop_outliers`.

    Where gamma exceeds 1 − density there are not enough elements below the outliers, and the window
    is at the lower end: the smallest are kept, as in mergekit.
    """

    def wanted(index: int, numel: int) -> list[int]:
        keep = int(densities(params)[index] * numel)
        dropped = max(0, numel - keep - int(params["gamma"][index + 1] * numel))
        return [numel - dropped, numel - dropped - keep]

    return (yield from find_cuts(params, place, wanted))

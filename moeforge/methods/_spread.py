"""Owns how far models are from one another, element by element, and what is farthest apart.

The spread of an element is Σ (xᵢ − xₖ)² over every two models: their variance but for a factor,
without a division and without the base. Of a tensor the share of elements that spread most is
found, and the energy of their differences from the base, as a rule in a single pass: a sample
brackets the threshold; what is above the bracket is selected, whatever is found, and its squares
are added up; of what is inside, the squares are held until it is known which of it belongs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeforge import kernels
from moeforge.methods import BLOCK, Measurement, Place, Scan
from moeforge.methods._counted import Counted, Limits, limit
from moeforge.methods._cut import NONE, Cut
from moeforge.methods._select import begin, counting, finish, held
from moeforge.methods._sums import add_up, blocks, joined, lane_sums, sums_for, total
from moeforge.methods._target import MOST, Target
from moeforge.methods._task import FEW, deltas, divided, summed

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class _Found:
    """What slices or a chunk hold.

    Attributes:
        pieces: what is above the bracket and inside.
        varying: how many elements vary at all.
        sums: energies of what is above, [blocks][models].
        squares: numpy [models, elements inside], of the differences from the base there, in the
            order of the values of `pieces`; None where these are not one for each element inside.
    """

    pieces: list[Counted]
    varying: int
    sums: list[list[float]]
    squares: Any


def matrix(tensors: Tensor) -> Any:
    """Return `tensors` for the kernels, or None; they add up few models only as torch does."""
    return kernels.matrix(tensors) if len(tensors) - 1 <= FEW else None


def spread(models: Tensor) -> Tensor:
    """Return Σ (xᵢ − xₖ)² over every two of few `models` [models, elements], in memory of its own.

    Of more models their variance times their number.
    """
    import torch

    if len(models) > FEW:
        parts = models - models[0]
        return summed((parts - divided(summed(parts), len(parts))).square_())
    result = torch.zeros_like(models[0])
    for i, model in enumerate(models):
        for other in models[i + 1 :]:
            result.add_((model - other).square_())
    return result


def spreads(tensors: Tensor) -> Tensor:
    """Return the spread of all but the first of `tensors` [inputs, elements], which is a base."""
    import torch

    if (values := matrix(tensors)) is None:
        return spread(tensors[1:].float() if tensors.element_size() == 2 else tensors[1:])
    from moeforge.kernels.varying import spreads as compiled

    out = torch.empty(values.shape[1])
    compiled(values, out.numpy())
    return out


def bounds(cut: Cut | None, start: int) -> tuple[Any, int]:
    """Return what kernels take for a cut, or for everything: two bounds, and where they change."""
    import numpy as np

    if cut is None:
        return np.full(2, -1.0, np.float32), 0
    if cut == NONE:  # not even spreads that are too large for float32
        return np.full(2, np.nan, np.float32), 0
    value = np.float32(cut.value)
    return np.array([value, np.nextafter(value, np.float32(np.inf))]), cut.last + 1 - start


def selected(tensors: Tensor, cut: Cut | None, start: int) -> Tensor:
    """Return the differences from the first of `tensors`, zero where a cut does not keep them."""
    if cut is None:
        return deltas(tensors)
    kept = cut(spreads(tensors), start)
    return deltas(tensors).mul_(kept)


def energies(cut: Cut | None) -> Measurement:
    """Return Σ δᵢ² of the differences from the base that a cut keeps, or of all of them."""

    def look(tensors: Tensor, here: Place) -> list[Any]:
        if (values := matrix(tensors)) is not None:
            from moeforge.kernels.varying import energies as compiled

            sums = sums_for(values, len(values) - 1)
            compiled(values, *bounds(cut, here.start), BLOCK, sums)
            return sums.tolist()  # type: ignore[no-any-return]
        parts = selected(tensors, cut, here.start)
        if parts.device.type == "cuda":
            from moeforge.methods._gpu import block_sums

            return block_sums(parts.square_()).T.tolist()
        return [joined(lane_sums(block)) for block in blocks(parts.square_())]

    return (yield from total(look))


def farthest(share: float, place: Place) -> Measurement:
    """Return the Cut of the elements that spread most, and the energies of what it keeps.

    Args:
        share: how many, of those that vary at all; below one.
        place: shape of the whole tensor.

    Raises:
        ValueError: there are NaN or infinite values where it counts.
    """
    target = Target(0, place.numel, share=share)

    def values(tensors: Tensor, here: Place) -> Tensor:
        return spreads(tensors)[None]

    yield from begin([target], values, place)
    chunks: list[_Found] = []
    count = 0
    if target.cut is None:
        look, join = _looking(target), _joining(held(place))
        chunks = yield Scan(look, join)
        count = target.know(sum(chunk.varying for chunk in chunks))
        target.settle([piece for chunk in chunks for piece in chunk.pieces])
    known = _energies(chunks, target.cut, count)
    yield from finish([target], values, place)
    return target.cut, known or (yield from energies(target.cut))


def _looking(target: Target) -> Any:
    """Return what looks at a slice for `farthest`."""
    import numpy as np
    import torch

    def look(tensors: Tensor, here: Place) -> _Found:
        limits = target.limits(np.float64 if tensors.dtype == torch.float64 else np.float32)
        # Where ends of the bracket are only counted, energies take a pass of their own.
        if target.counts_ends or tensors.device.type == "cuda":
            found = spreads(tensors)
            pieces = counting([target], lambda *_: found[None])(tensors, here)
            return _Found(pieces, _varying(found), [], None)
        compiled = matrix(tensors)
        seen = _tally(tensors, limits) if compiled is None else _tally_compiled(compiled, limits)
        (above, varying, crowded), sums, inside, squares = seen
        piece = target.counted(here.start, tensors.shape[1], limits, (above, 0, 0), inside)
        # It goes by blocks and not by slices whether there are squares at all.
        return _Found([piece], varying, sums, None if crowded else squares)

    return look


def _varying(found: Tensor) -> int:
    """Return how many spreads are not zero."""
    import numpy as np

    if found.device.type == "cuda":
        return int(found.count_nonzero())
    # Counting bools is several times faster than counting floats.
    return int(np.count_nonzero(found.numpy() != 0))


def _tally(tensors: Tensor, limits: Limits) -> Any:
    """Return (above, varying, crowded), sums, values inside and their squares.

    Crowded is where more than a share MOST of a block is inside.
    """
    import numpy as np
    import torch

    found = spreads(tensors)
    parts, values = deltas(tensors), found.numpy()
    reaching = values >= limits.stop
    inside = np.flatnonzero((values >= limits.first) ^ reaching)
    squares = np.square(parts.numpy()[:, inside])
    # A comparison into floats: several times faster than through bools.
    above = torch.ge(found, float(limits.stop), out=torch.empty_like(found))
    parts.mul_(above).square_()
    sums, crowded = [], False
    for number, block in enumerate(blocks(parts)):
        sums.append(joined(lane_sums(block)))
        here = np.searchsorted(inside, (number * BLOCK, (number + 1) * BLOCK))
        crowded |= bool(here[1] - here[0] > MOST * block.shape[1])
    counts = (int(np.count_nonzero(reaching)), _varying(found), crowded)
    return counts, sums, values[inside], squares


def _tally_compiled(values: Any, limits: Limits) -> Any:
    """Do as `_tally`, by the kernel."""
    import numpy as np

    from moeforge.kernels.varying import tally

    models, count = values.shape[0] - 1, values.shape[1]
    sums, inside = sums_for(values, models), np.empty(count, np.float32)
    squares = np.empty((models, count), np.float32)
    above, varying, many, crowded = tally(
        *(values, limits.first, limits.stop, BLOCK, MOST, sums, inside, squares)
    )
    counts = (above, varying, crowded)
    return counts, sums.tolist(), inside[:many].copy(), squares[:, :many].copy()


def _joining(most: int) -> Any:
    """Return what joins what was found in the slices of a chunk."""
    import numpy as np

    join_pieces = limit(most)

    def join(found: list[_Found]) -> _Found:
        pieces = [piece for one in found for piece in one.pieces]
        squares = [one.squares for one in found]
        fits = all(s is not None for s in squares) and sum(len(s[0]) for s in squares) <= most
        return _Found(
            join_pieces(pieces),
            sum(one.varying for one in found),
            [sums for one in found for sums in one.sums],
            np.concatenate(squares, axis=1) if fits else None,
        )

    return join


def _energies(chunks: Sequence[_Found], cut: Cut | None, count: int) -> tuple[float, ...] | None:
    """Return the energies of what `cut` keeps, `count` elements, if the chunks tell them."""
    import numpy as np
    import torch

    if cut in (None, NONE) or not chunks or any(chunk.squares is None for chunk in chunks):
        return None
    values = [np.concatenate([piece.values for piece in chunk.pieces]) for chunk in chunks]
    kept = [array > cut.value for array in values]
    above = sum(piece.above for chunk in chunks for piece in chunk.pieces)
    missing = count - above - sum(int(np.count_nonzero(array)) for array in kept)
    sums = [line for chunk in chunks for line in chunk.sums]
    for chunk, array, chosen in zip(chunks, values, kept, strict=True):
        equal = np.flatnonzero(array == cut.value)[:missing]  # of equal ones those that come first
        chosen[equal] = True
        missing -= len(equal)
        squares = torch.from_numpy(np.multiply(chunk.squares, chosen, out=chunk.squares))
        sums += (joined(lane_sums(block)) for block in blocks(squares))
    return add_up(sums)

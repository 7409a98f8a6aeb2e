"""Owns selection by magnitude: exact thresholds of whole tensors, found by streaming.

No tensor is sorted. A sample brackets the k-th largest magnitude, one pass counts what lies above
the bracket and collects the values inside; equal magnitudes are told apart by position.
Where the bracket misses, another pass looks on the side where it must be.

In memory for each threshold: the sample (2¹⁶ magnitudes), and the values inside the bracket, at
most some 2²¹; of more, the distinct ones with their counts; where these are more, neighbours are
counted together, and one more pass tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from moeforge.methods import CHUNK, Look, Measurement, Place, Scan
from moeforge.methods._counted import Counted, limit
from moeforge.methods._target import Target

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 2**18
"""Elements up to which a tensor's magnitudes are simply held and sorted."""
_HELD = 2**21
"""Values that are held for each threshold, about."""

Magnitudes = Callable[["Tensor", Place], "Tensor"]
"""Gives the quantities of a slice to select from: [quantities, elements] in float32 or float64, not
negative."""


class Compiled(NamedTuple):
    """How quantities are looked at without putting them into memory; None for other tensors.

    Attributes:
        tally: (tensors, quantities, limits), where there is an open threshold for each of
            `quantities` and for each of these one line of `limits`, the first four of `Limits` in
            float32. Returns, for each, how many elements are `stop` or more, and how many are `low`
            and `high`, where these are not NaN; and an array of those from `first` on and below
            `stop`.
        where: (tensors, quantity, value) -> numbers of the elements equal to a value, ascending.
    """

    tally: Callable[[Tensor, Sequence[int], Any], Any]
    where: Callable[[Tensor, int, float], Any]


def _concatenate(pieces: Sequence[Any]) -> Any:
    import numpy as np

    return np.concatenate(pieces)


def cuts(
    magnitudes: Magnitudes,
    wanted: Sequence[Sequence[int]],
    place: Place,
    compiled: Compiled | None = None,
) -> Measurement:
    """Return, for each quantity and each count k wanted of it, the Cut that keeps its k largest.

    Args:
        magnitudes: the quantities.
        wanted: counts for each quantity.
        place: shape of the whole tensor.
        compiled: looks at them compiled, where it can.

    Raises:
        ValueError: a quantity has NaN or infinite values where it counts.
    """
    targets = [Target(i, place.numel, k) for i, counts in enumerate(wanted) for k in counts]
    yield from begin(targets, magnitudes, place)
    yield from finish(targets, magnitudes, place, compiled)
    return [[t.cut for t in targets if t.quantity == i] for i in range(len(wanted))]


def begin(targets: Sequence[Target], magnitudes: Magnitudes, place: Place) -> Measurement:
    """Find the cuts of a small tensor; bracket those of others by a sample."""
    if _missing(targets) and place.numel <= SMALL:
        look = _by_values("copy", targets, magnitudes)
        for target, found in (yield from _scan(targets, look, _concatenate)):
            target.select(_concatenate(found))
    if _missing(targets):
        look = _by_values("copy", targets, magnitudes)
        for target, found in (yield from _scan(targets, look, _concatenate, sample=True)):
            target.bracket(found)


def finish(
    targets: Sequence[Target],
    magnitudes: Magnitudes,
    place: Place,
    compiled: Compiled | None = None,
) -> Measurement:
    """Find the cuts that are still open, from their brackets, and the positions of all."""
    while _missing(targets):
        look, join = counting(targets, magnitudes, compiled), limit(held(place))
        for target, found in (yield from _scan(targets, look, join)):
            target.settle([piece for pieces in found for piece in pieces])
    borders = tuple(sorted({target.border for target in targets if target.border}))
    if borders:
        look = _locating(targets, magnitudes, compiled)
        for target, found in (yield from _scan(targets, look, _concatenate, borders)):
            target.locate(dict(zip(borders, found, strict=True)))


def held(place: Place) -> int:
    """Return how many values of a chunk are held for each threshold, about."""
    return _HELD * CHUNK // place.numel


def counting(
    targets: Sequence[Target], magnitudes: Magnitudes, compiled: Compiled | None = None
) -> Callable[[Tensor, Place], list[Counted]]:
    """Return what counts and collects in one pass: of a slice, a Counted for each target."""
    import numpy as np

    wanting = [target for target in targets if target.cut is None]
    limits = [target.limits(np.float32) for target in wanting]
    quantities = [target.quantity for target in wanting]
    lines = np.array([t.asked(line) for t, line in zip(wanting, limits, strict=True)])
    nothing, by_values = np.zeros(0, np.float32), _by_values("count", targets, magnitudes)

    def count(tensors: Tensor, here: Place) -> list[Counted]:
        counts = None
        if tensors.device.type == "cuda" and tensors.element_size() == 4:
            from moeforge.methods._gpu import tally as tally_there

            counts = tally_there(magnitudes(tensors, here), quantities, lines)
        elif compiled is not None:
            counts = compiled.tally(tensors, quantities, lines)
        if counts is None:
            return by_values(tensors, here)  # type: ignore[no-any-return]
        start, size, found = here.start, tensors.shape[1], zip(limits, *counts, strict=True)
        return [
            t.count(nothing, start) if t.cut is not None else t.counted(start, size, *next(found))
            for t in targets
        ]

    return count


def _missing(targets: Sequence[Target]) -> bool:
    return any(target.cut is None for target in targets)


def _by_values(name: str, targets: Sequence[Target], magnitudes: Magnitudes) -> Look:
    """Return what calls method `name` of every target with the magnitudes of a slice."""

    def look(tensors: Tensor, here: Place) -> list[Any]:
        arrays = magnitudes(tensors, here).cpu().numpy()
        return [getattr(t, name)(arrays[t.quantity], here.start) for t in targets]

    return look


def _locating(targets: Sequence[Target], magnitudes: Magnitudes, compiled: Compiled | None) -> Look:
    """Return what looks for elements equal to cuts, where the last that belongs is among them."""
    import numpy as np

    def look(tensors: Tensor, here: Place) -> list[Any]:
        values: Any = None

        def where(quantity: int, value: float) -> Any:
            nonlocal values
            found = compiled.where(tensors, quantity, value) if compiled is not None else None
            if found is not None:
                return found
            if values is None:
                values = magnitudes(tensors, here)
            if values.device.type == "cuda":
                from moeforge.methods._gpu import equal

                return equal(values[quantity], value)
            return np.flatnonzero(values[quantity].numpy() == value)

        return [target.positions(where, here.start) for target in targets]

    return look


def _scan(
    targets: Sequence[Target],
    look: Look,
    join: Callable[[Sequence[Any]], Any],
    runs: tuple[tuple[int, int], ...] | None = None,
    *,
    sample: bool = False,
) -> Measurement:
    """Scan for something of every target; return each target with its chunks' results."""

    def join_each(pieces: list[Any]) -> list[Any]:
        return [join(parts) for parts in zip(*pieces, strict=True)]

    chunks = yield Scan(look, join_each, runs, sample)
    return list(zip(targets, zip(*chunks, strict=True), strict=True))

"""Owns selection by magnitude: exact thresholds of whole tensors, found by streaming.

No tensor is sorted. A sample brackets the k-th largest magnitude, one pass counts what lies above
the bracket and collects the values inside; equal magnitudes are told apart by position.
Where the bracket misses, another pass looks on the side where it must be.

In memory for each threshold: the sample (2¹⁶ magnitudes), and the values inside the bracket, at
most some 2²¹; of more, the distinct ones with their counts; where these are more, neighbours are
counted together, and one more pass tells them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from moeforge import kernels
from moeforge.methods import CHUNK, RUN, Measurement, Place, Scan
from moeforge.methods._counted import (
    RESOLUTION,
    Counted,
    Limits,
    bits,
    inside_of,
    largest,
    limit,
    merge,
)
from moeforge.methods._cut import NONE, Cut

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 2**18
"""Elements up to which a tensor's magnitudes are simply held and sorted."""
_SIGMAS, _WIDEST = 3.5, 0.04
"""Half the bracket's width in standard errors of the sample; and at most, in share of elements."""
_MANY = {False: 0.005, True: 0.03}
"""Share of the elements from which on it is faster to count them than to collect them; compiled,
which collects without a branch, or not."""
_MOST = 0.25
"""Share of a slice that is collected, of which only the distinct values are held."""
_HELD = 2**21
"""Values that are held for each threshold, about."""

Magnitudes = Callable[["Tensor", Place], "Tensor"]
"""Gives the quantities of a slice to select from: [quantities, elements] in float32 or float64, not
negative."""


_NOT_FINITE = "the inputs hold infinite values or NaN"


Tally = Callable[["Tensor", Sequence[int], Any], Any]
"""Compiled counting: (tensors, quantities, limits), where there is an open threshold for each of
`quantities` and for each of these one line of `limits`, the first four of `Limits` in float32.
Returns, for each, how many elements are `stop` or more, and how many are `low` and `high`, where
these are not NaN; and an array of those from `first` on and below `stop`. Or None, where tensors
are not for compiled arithmetic."""


class _Target:
    """The search for the k-th largest of one quantity.

    Attributes:
        quantity: index of the quantity.
        cut: what is looked for, once it is found.
        border: the chunk that holds the last element which belongs, while its number is open.
    """

    def __init__(self, quantity: int, count: int, numel: int) -> None:
        self.quantity = quantity
        self.cut: Cut | None = None
        self.border: tuple[int, int] | None = None
        self._count, self._numel = count, numel
        self._low, self._high = 0.0, math.inf
        self._many = (False, False)
        self._equal = 0
        if count <= 0:
            self.cut = NONE

    def copy(self, values: Any, start: int) -> Any:
        """Return `values`."""
        return values.copy() if self.cut is None else values[:0]

    def select(self, values: Any) -> None:
        """Find the cut in all magnitudes of the tensor."""
        import numpy as np

        if self.cut is None:
            order = np.argsort(-values, kind="stable")
            last = int(order[self._count - 1])
            if not np.isfinite(values[last]):
                raise ValueError(_NOT_FINITE)
            self.cut = Cut(float(values[last]), last)

    def bracket(self, runs: Sequence[Any]) -> None:
        """Set the bracket from runs of a sample.

        Elements of one row are alike, so the standard error is taken from how the runs differ.
        """
        import numpy as np

        if self.cut is not None:
            return
        values = np.concatenate(runs)
        rank = self._count / self._numel * values.size
        ordered = np.sort(values)
        middle = ordered[_index(values.size, rank)]
        if len(runs) == 1:
            whole = values[: values.size // RUN * RUN].reshape(-1, RUN)
            shares = np.count_nonzero(whole > middle, axis=1)
        else:
            shares = np.array([np.count_nonzero(run > middle) for run in runs])
        error = float(shares.std()) * math.sqrt(len(shares))
        margin = min(_SIGMAS * error + 16, _WIDEST * values.size)
        low = ordered[_index(values.size, rank + margin)]
        high = ordered[_index(values.size, rank - margin)]
        self._low = float(low) if rank + margin < values.size else 0.0
        self._high = float(high) if rank - margin > 0 else math.inf
        # Where inputs have few bits, much may be equal to an end: that is counted, not collected.
        many = _MANY[kernels.loaded()] * values.size
        often = [np.count_nonzero(values == end) > many for end in (low, high)]
        self._many = bool(often[0] and self._low > 0.0), bool(often[1] and self._high < math.inf)

    def limits(self, kind: Any) -> Limits:
        """Return what is counted and what is collected, in numpy dtype `kind`."""
        import numpy as np

        ends = np.array([self._low, self._high], kind)
        if ends[0] == ends[1]:
            self._many = (True, True)
        inner = np.nextafter(ends, np.array(np.inf, kind))
        first = inner[0] if self._many[0] else ends[0]
        lowest, highest = bits(ends).tolist()
        spare = max((highest - lowest).bit_length() - RESOLUTION, 0)
        return Limits(first, ends[1] if self._many[1] else inner[1], ends[0], ends[1], spare)

    def asked(self, limits: Limits) -> Any:
        """Return a line for `Tally`."""
        import numpy as np

        line = np.array(limits[:4], np.float32)
        line[2:][np.logical_not(self._many)] = np.nan
        return line

    def count(self, values: Any, start: int) -> Counted:
        """Count the elements above the bracket, and collect those inside."""
        import numpy as np

        size = len(values)
        if self.cut is not None:
            return Counted(start, size, 0, values[:0])
        limits = self.limits(values.dtype)
        inside, reached = inside_of(values, limits.first, limits.stop)
        low = int(np.count_nonzero(values == limits.low)) if self._many[0] else 0
        high = int(np.count_nonzero(values == limits.high)) if self._many[1] else 0
        return self.counted(start, size, limits, (reached, low, high), inside)

    def counted(
        self, start: int, size: int, limits: Limits, found: tuple[int, int, int], inside: Any
    ) -> Counted:
        """Return what `Tally` found, put together."""
        reached, low, high = found
        # Of many elements equal to an end none were collected.
        low = low if self._many[0] and limits.low != limits.high else 0
        high = high if self._many[1] else 0
        ends = (limits.low, limits.high)
        piece = Counted(
            start, size, reached - high, inside, ends=ends, equal=(low, high), spare=limits.spare
        )
        # The bracket missed: what is collected is not to grow with the chunk.
        return piece.distinct() if len(inside) > _MOST * size else piece

    def settle(self, pieces: Sequence[Counted]) -> None:
        """Find the cut if its value lies inside the bracket; its position may stay open.

        If not, set the bracket to where it must lie.

        Raises:
            ValueError: it is not a finite number.
        """
        import numpy as np

        if self.cut is not None:
            return
        if all(piece.counts is None for piece in pieces):
            self._rank(pieces)
            return
        whole = merge(pieces)
        self._many = (False, False)  # known of the sample's ends only
        # How many elements are at least as large as each value, the largest value first.
        reached = whole.above + np.cumsum(whole.counts[::-1])
        index = int(np.searchsorted(reached, self._count))
        if self._count <= whole.above:
            self._low, self._high = self._high, math.inf
        elif index == len(reached):
            if self._low == 0.0:
                raise ValueError(_NOT_FINITE)
            self._low, self._high = 0.0, self._low
        elif whole.rounded:
            # All that stands for the value, and nothing more: the next value may be far.
            value, high = whole.values[::-1][index], whole.values.dtype.type(self._high)
            end = np.array([min(int(bits(value)) + (1 << whole.spare), int(bits(high)))])
            end = end.astype(bits(value).dtype).view(value.dtype)
            self._low, self._high = float(value), float(end[0])
        else:
            self._found(whole.values[::-1][index], self._count - int(reached[index]), pieces)

    def _rank(self, pieces: Sequence[Counted]) -> None:
        """Do as `settle`, from values as they were collected."""
        above, inside = (sum(getattr(p, name) for p in pieces) for name in ("above", "inside"))
        self._many = (False, False)
        if self._count <= above:
            self._low, self._high = self._high, math.inf
        elif self._count > above + inside:
            if self._low == 0.0:
                raise ValueError(_NOT_FINITE)
            self._low, self._high = 0.0, self._low
        else:
            value, reached = largest(pieces, self._count - above)
            self._found(value, self._count - above - reached, pieces)

    def _found(self, value: Any, beyond: int, pieces: Sequence[Counted]) -> None:
        """Set the cut's value, and the piece in which the last element that belongs lies.

        Args:
            value: the k-th largest magnitude.
            beyond: k less the number of elements of at least that magnitude: zero or less.
            pieces: what the tensor holds, in order.
        """
        import numpy as np

        if not np.isfinite(value):
            raise ValueError(_NOT_FINITE)
        each = [piece.equal_to(value) for piece in pieces]
        left = sum(each) + beyond
        self.cut = Cut(float(value), self._numel)
        if not beyond:
            return
        for piece, here in zip(pieces, each, strict=True):
            if left <= here:
                self.border, self._equal = (piece.start, piece.size), left
                return
            left -= here

    def positions(self, values: Any, start: int) -> Any:
        """Return the numbers of the elements that are equal to the cut's value."""
        import numpy as np

        if self.border is None or self.cut is None:
            return np.zeros(0, np.int64)
        if not isinstance(values, np.ndarray):
            from moeforge.methods._gpu import equal

            return equal(values, self.cut.value) + start
        return np.flatnonzero(values == self.cut.value) + start

    def locate(self, found: dict[tuple[int, int], Any]) -> None:
        """Set the cut's position from the numbers of the elements equal to it, by chunk."""
        if self.border is not None and self.cut is not None:
            self.cut = Cut(self.cut.value, int(found[self.border][self._equal - 1]))


def _index(size: int, rank: float) -> int:
    """Return the place in ascending order of the element that is `rank`-th from the top."""
    return min(max(size - round(rank), 0), size - 1)


def _concatenate(pieces: Sequence[Any]) -> Any:
    import numpy as np

    return np.concatenate(pieces)


def cuts(
    magnitudes: Magnitudes,
    wanted: Sequence[Sequence[int]],
    place: Place,
    tally: Tally | None = None,
) -> Measurement:
    """Return, for each quantity and each count k wanted of it, the Cut that keeps its k largest.

    Args:
        magnitudes: the quantities.
        wanted: counts for each quantity.
        place: shape of the whole tensor.
        tally: counts compiled, where it can.

    Raises:
        ValueError: a quantity has NaN or infinite values where it counts.
    """
    targets = [_Target(i, k, place.numel) for i, counts in enumerate(wanted) for k in counts]

    def missing() -> bool:
        return any(target.cut is None for target in targets)

    def counter() -> Callable[[Tensor, Place], list[Any] | None]:
        """Return what counts in one pass, compiled or on a GPU; None where it cannot."""
        import numpy as np

        wanting = [target for target in targets if target.cut is None]
        limits = [target.limits(np.float32) for target in wanting]
        quantities = [target.quantity for target in wanting]
        lines = np.array([t.asked(line) for t, line in zip(wanting, limits, strict=True)])
        nothing = np.zeros(0, np.float32)

        def count(tensors: Tensor, here: Place) -> list[Any] | None:
            counts = None
            if tensors.device.type == "cuda" and tensors.element_size() == 4:
                from moeforge.methods._gpu import tally as tally_there

                counts = tally_there(magnitudes(tensors, here), quantities, lines)
            elif tally is not None:
                counts = tally(tensors, quantities, lines)
            if counts is None:
                return None
            start, size, found = here.start, tensors.shape[1], zip(limits, *counts, strict=True)
            return [
                t.count(nothing, start)
                if t.cut is not None
                else t.counted(start, size, *next(found))
                for t in targets
            ]

        return count

    def scan(
        name: str,
        join: Callable[[Sequence[Any]], Any],
        runs: tuple[tuple[int, int], ...] | None = None,
        *,
        sample: bool = False,
    ) -> Measurement:
        """Scan with method `name` of every target; return each target with its chunks' results."""
        count = counter() if name == "count" else None

        def look(tensors: Tensor, here: Place) -> list[Any]:
            if count is not None and (found := count(tensors, here)) is not None:
                return found
            arrays: Any = magnitudes(tensors, here)
            if name != "positions" or arrays.device.type != "cuda":
                arrays = arrays.cpu().numpy()
            return [getattr(t, name)(arrays[t.quantity], here.start) for t in targets]

        def join_each(pieces: list[Any]) -> list[Any]:
            return [join(parts) for parts in zip(*pieces, strict=True)]

        chunks = yield Scan(look, join_each, runs, sample)
        return list(zip(targets, zip(*chunks, strict=True), strict=True))

    if missing() and place.numel <= SMALL:
        for target, found in (yield from scan("copy", _concatenate)):
            target.select(_concatenate(found))
    if missing():
        for target, found in (yield from scan("copy", _concatenate, sample=True)):
            target.bracket(found)
    while missing():
        join = limit(_HELD * CHUNK // place.numel)
        for target, found in (yield from scan("count", join)):
            target.settle([piece for pieces in found for piece in pieces])
    borders = tuple(sorted({target.border for target in targets if target.border}))
    if borders:
        for target, found in (yield from scan("positions", _concatenate, borders)):
            target.locate(dict(zip(borders, found, strict=True)))
    return [[t.cut for t in targets if t.quantity == i] for i in range(len(wanted))]

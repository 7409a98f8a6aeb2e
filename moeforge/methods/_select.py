"""Owns selection by magnitude: exact thresholds of whole tensors, found by streaming.

Nothing is sorted but samples. A sample brackets the k-th largest magnitude, one pass counts what
lies above the bracket and collects the distinct values inside; equal magnitudes are told apart by
position. If the bracket misses, a histogram of float bits finds one that cannot.

In memory: the sample (2¹⁷ magnitudes), and for each chunk of some million elements the distinct
values inside the bracket with their counts; a bracket is at most some percent of the elements wide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeforge.methods import Measurement, Place, Scan

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 2**18
"""Elements up to which a tensor's magnitudes are simply held and sorted."""
_RUNS, _RUN = 32, 2**12
"""A sample is so many runs of so many elements, spread evenly."""
_SIGMAS, _WIDEST = 5.0, 0.04
"""Half the bracket's width in standard errors of the sample; and at most, in share of elements."""

Magnitudes = Callable[[Sequence["Tensor"], Place], "Sequence[Tensor]"]
"""Gives the quantities of a slice to select from: one tensor each, float32 or float64, not
negative; scratch."""


@dataclass(frozen=True)
class Cut:
    """The k elements of greatest magnitude: those above `value`, those equal to it up to `last`.

    Attributes:
        value: the k-th largest magnitude.
        last: number of the last element of magnitude `value` that belongs to them.
    """

    value: float
    last: int

    def __call__(self, magnitudes: Tensor, start: int) -> Tensor:
        """Return 1 for elements that belong and 0 for others, in the dtype of `magnitudes`."""
        import torch

        # Comparisons into floats: several times faster than through bools.
        kept = torch.empty_like(magnitudes)
        border = min(max(self.last + 1 - start, 0), magnitudes.numel())
        torch.ge(magnitudes[:border], self.value, out=kept[:border])
        torch.gt(magnitudes[border:], self.value, out=kept[border:])
        return kept


_NOT_FINITE = "the inputs hold infinite values or NaN"
NONE = Cut(math.inf, -1)
"""Keeps nothing."""


@dataclass(frozen=True)
class _Counted:
    """What one chunk holds: its range, elements above a bracket, and what is inside.

    Attributes:
        values: the distinct magnitudes inside the bracket, ascending; a numpy array.
        counts: how often each occurs; int64.
    """

    start: int
    size: int
    above: int
    values: Any
    counts: Any


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
        middle = np.partition(values, _index(values.size, rank))[_index(values.size, rank)]
        shares = np.array([np.count_nonzero(run > middle) for run in runs], dtype=float)
        error = float(shares.std()) * math.sqrt(len(runs))
        margin = min(_SIGMAS * error + 16, _WIDEST * values.size)
        ends = [_index(values.size, rank + margin), _index(values.size, rank - margin)]
        low, high = np.partition(values, ends)[ends]
        self._low = float(low) if rank + margin < values.size else 0.0
        self._high = float(high) if rank - margin > 0 else math.inf

    def count(self, values: Any, start: int) -> _Counted:
        """Count the elements above the bracket, and the distinct values inside."""
        import numpy as np

        if self.cut is not None:
            return _Counted(start, values.size, 0, values[:0], np.zeros(0, np.int64))
        above = int(np.count_nonzero(values > self._high))
        if self._low == self._high:
            equal = int(np.count_nonzero(values == self._low))
            distinct, counts = (
                np.full(equal > 0, self._low, values.dtype),
                np.full(equal > 0, equal),
            )
        else:
            inside = (values >= self._low) & (values <= self._high)
            distinct, counts = np.unique(values[inside], return_counts=True)
        return _Counted(start, values.size, above, distinct, counts)

    def settle(self, chunks: Sequence[_Counted]) -> None:
        """Find the cut if its value lies inside the bracket; its position may stay open."""
        import numpy as np

        if self.cut is not None:
            return
        whole = _join(chunks)
        # How many elements are at least as large as each value, the largest value first.
        reached = whole.above + np.cumsum(whole.counts[::-1])
        index = int(np.searchsorted(reached, self._count))
        if self._count <= whole.above or index == len(reached):
            return
        value = whole.values[::-1][index]
        left = self._equal = self._count - int(reached[index] - whole.counts[::-1][index])
        for chunk in chunks:
            here = int(chunk.counts[chunk.values == value].sum())
            if left <= here:
                break
            left -= here
        self.cut, self._equal = Cut(float(value), -1), left
        self.border = (chunk.start, chunk.size)

    def histogram(self, values: Any, start: int) -> Any:
        """Count the magnitudes by the upper bits of their float32 form, which order them."""
        import numpy as np

        if self.cut is not None:
            return np.zeros(0, np.int64)
        bits = values.astype(np.float32, copy=False).view(np.uint32) >> np.uint32(16)
        return np.bincount(bits, minlength=2**15)

    def bracket_by_bits(self, chunks: Sequence[Any]) -> None:
        """Set the bracket to the bin of the histogram that holds the k-th largest.

        Raises:
            ValueError: it is not a finite number.
        """
        import numpy as np

        if self.cut is not None:
            return
        reached = np.cumsum(sum(chunks)[::-1])
        upper = 2**15 - 1 - int(np.searchsorted(reached, self._count))
        edges = np.array([upper, upper + 1], np.uint32) << np.uint32(16)
        low, high = edges.view(np.float32)
        if not np.isfinite(low):
            raise ValueError(_NOT_FINITE)
        # float64 values were rounded to float32 when they were counted.
        self._low = float(np.nextafter(low, np.float32(0)))
        self._high = float(high)

    def positions(self, values: Any, start: int) -> Any:
        """Return the numbers of the elements that are equal to the cut's value."""
        import numpy as np

        if self.border is None or self.cut is None:
            return np.zeros(0, np.int64)
        return np.flatnonzero(values == self.cut.value) + start

    def locate(self, found: dict[tuple[int, int], Any]) -> None:
        """Set the cut's position from the numbers of the elements equal to it, by chunk."""
        if self.border is not None and self.cut is not None:
            self.cut = Cut(self.cut.value, int(found[self.border][self._equal - 1]))


def _index(size: int, rank: float) -> int:
    """Return the place in ascending order of the element that is `rank`-th from the top."""
    return min(max(size - round(rank), 0), size - 1)


def _join(pieces: Sequence[_Counted]) -> _Counted:
    """Put what neighbouring pieces of a tensor hold together."""
    import numpy as np

    values, place = np.unique(np.concatenate([p.values for p in pieces]), return_inverse=True)
    counts = np.zeros(len(values), np.int64)
    np.add.at(counts, place, np.concatenate([p.counts for p in pieces]))
    size, above = sum(p.size for p in pieces), sum(p.above for p in pieces)
    return _Counted(pieces[0].start, size, above, values, counts)


def _concatenate(pieces: Sequence[Any]) -> Any:
    import numpy as np

    return np.concatenate(pieces)


def _sample_runs(numel: int, row: int) -> tuple[tuple[int, int], ...]:
    """Return runs, multiples of `row`, one at an irregular place in each of equal stretches."""
    length = -(-_RUN // row) * row
    stretch = numel / _RUNS
    if length >= stretch:
        return ((0, numel),)
    starts = (int((i + (i * 0.6180339887) % 1.0) * stretch) // row * row for i in range(_RUNS))
    return tuple((min(start, numel - length), length) for start in starts)


def cuts(
    magnitudes: Magnitudes,
    wanted: Sequence[Sequence[int]],
    place: Place,
    *,
    whole_rows: bool = False,
) -> Measurement:
    """Return, for each quantity and each count k wanted of it, the Cut that keeps its k largest.

    Args:
        magnitudes: the quantities.
        wanted: counts for each quantity.
        place: shape of the whole tensor.
        whole_rows: whether `magnitudes` needs whole rows.

    Raises:
        ValueError: a quantity has NaN or infinite values where it counts.
    """
    targets = [_Target(i, k, place.numel) for i, counts in enumerate(wanted) for k in counts]

    def scan(
        name: str,
        join: Callable[[Sequence[Any]], Any],
        runs: tuple[tuple[int, int], ...] | None = None,
    ) -> Measurement:
        """Scan with method `name` of every target; return each target with its chunks' results."""

        def look(tensors: Sequence[Tensor], here: Place) -> list[Any]:
            arrays = [values.cpu().numpy() for values in magnitudes(tensors, here)]
            return [getattr(t, name)(arrays[t.quantity], here.start) for t in targets]

        def join_each(pieces: list[Any]) -> list[Any]:
            return [join(parts) for parts in zip(*pieces, strict=True)]

        chunks = yield Scan(look, join_each, runs)
        return list(zip(targets, zip(*chunks, strict=True), strict=True))

    if any(target.cut is None for target in targets):
        if place.numel <= SMALL:
            for target, found in (yield from scan("copy", _concatenate)):
                target.select(_concatenate(found))
        else:
            runs = _sample_runs(place.numel, place.row if whole_rows else 1)
            for target, found in (yield from scan("copy", _concatenate, runs)):
                target.bracket(found)
            for target, found in (yield from scan("count", _join)):
                target.settle(found)
    if any(target.cut is None for target in targets):
        for target, found in (yield from scan("histogram", sum)):
            target.bracket_by_bits(found)
        for target, found in (yield from scan("count", _join)):
            target.settle(found)
    borders = tuple(sorted({target.border for target in targets if target.border}))
    if borders:
        for target, found in (yield from scan("positions", _concatenate, borders)):
            target.locate(dict(zip(borders, found, strict=True)))
    return [[t.cut for t in targets if t.quantity == i] for i in range(len(wanted))]

"""Owns the search for the k-th largest of one quantity: its bracket, what a pass leaves open."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from moeforge import kernels
from moeforge.methods import RUN
from moeforge.methods._counted import RESOLUTION, Counted, Limits, bits, inside_of, largest, merge
from moeforge.methods._cut import NONE, Cut

MOST = 0.25
"""Share of a slice that is collected, of which only the distinct values are held."""
_SIGMAS, _WIDEST = 3.5, 0.04
"""Half the bracket's width in standard errors of the sample; and at most, in share of elements."""
_MANY = {False: 0.005, True: 0.03}
"""Share of the elements from which on it is faster to count them than to collect them; compiled,
which collects without a branch, or not."""
_MANY_OF_SHARE = 0.12
"""The same where k is a share. It costs a pass of `_spread` to count them, and must not depend on
what is compiled."""
_NOT_FINITE = "the inputs hold infinite values or NaN"


class Target:
    """The search for the k-th largest of one quantity.

    Args:
        quantity: index of the quantity.
        numel: elements of the tensor.
        count: k; or None, where it is known after a pass: see `know`.
        share: what k is then, of the elements that are not zero; below one.

    Attributes:
        quantity: index of the quantity.
        cut: what is looked for, once it is found.
        border: the chunk that holds the last element which belongs, while its number is open.
    """

    def __init__(
        self, quantity: int, numel: int, count: int | None = None, share: float = 0.0
    ) -> None:
        self.quantity = quantity
        self.cut: Cut | None = None
        self.border: tuple[int, int] | None = None
        self._count, self._numel, self._share = count, numel, max(share, 0.0)
        self._low, self._high = 0.0, math.inf
        self._least = 0.0
        self._many = (False, False)
        self._equal = 0
        if count is not None and min(count, numel) <= 0:
            self.cut = NONE

    def know(self, nonzero: int) -> int:
        """Return k, which is a share of as many elements as are not zero."""
        import numpy as np

        # In float32, as mergekit: of 100 elements a share of 0.29 is 29, not 28.
        self._count = int(np.float32(nonzero) * np.float32(self._share))
        if self._count <= 0:
            self.cut = NONE
        return self._count

    @property
    def counts_ends(self) -> bool:
        """Whether elements equal to an end of the bracket are counted and not collected."""
        return any(self._many)

    def copy(self, values: Any, start: int) -> Any:
        """Return `values`."""
        return values.copy() if self.cut is None else values[:0]

    def select(self, values: Any) -> None:
        """Find the cut in all magnitudes of the tensor."""
        import numpy as np

        if self.cut is not None:
            return
        count = self.know(int(np.count_nonzero(values))) if self._count is None else self._count
        if count > 0:
            order = np.argsort(-values, kind="stable")
            last = int(order[count - 1])
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
        if self._count is None:
            rank = self._share * int(np.count_nonzero(values))
            self._least = float(np.nextafter(values.dtype.type(0), values.dtype.type(1)))
        else:
            rank = self._count / self._numel * values.size
        at = _ranks(values)
        middle = at(rank)

        def beyond(run: Any) -> Any:
            """Return how many are above the middle: of a share, more than would be right."""
            many = np.count_nonzero(run > middle, axis=-1)
            return many - self._share * np.count_nonzero(run, axis=-1) if self._share else many

        if len(runs) == 1:
            each = beyond(values[: values.size // RUN * RUN].reshape(-1, RUN))
        else:
            each = np.array([beyond(run) for run in runs])
        error = float(each.std()) * math.sqrt(len(each))
        margin = min(_SIGMAS * error + 16, _WIDEST * values.size)
        low = at(rank + margin)
        high = at(rank - margin)
        self._low = max(float(low) if rank + margin < values.size else 0.0, self._least)
        self._high = float(high) if rank - margin > 0 else math.inf
        # Where inputs have few bits, much may be equal to an end: that is counted, not collected.
        many = _MANY_OF_SHARE if self._count is None else _MANY[kernels.loaded()]
        ends = (self._low, self._high)
        often = [np.count_nonzero(values == end) > many * values.size for end in ends]
        self._many = bool(often[0] and self._low > 0.0), bool(often[1] and self._high < math.inf)

    def limits(self, kind: Any) -> Limits:
        """Return what is counted and what is collected, in numpy dtype `kind`."""
        import numpy as np

        ends = np.array([self._low, self._high], kind)
        if ends[0] == ends[1] and self._count is not None:
            self._many = (True, True)
        inner = np.nextafter(ends, np.array(np.inf, kind))
        first = inner[0] if self._many[0] else ends[0]
        lowest, highest = bits(ends).tolist()
        spare = max((highest - lowest).bit_length() - RESOLUTION, 0)
        return Limits(first, ends[1] if self._many[1] else inner[1], ends[0], ends[1], spare)

    def asked(self, limits: Limits) -> Any:
        """Return a line for `Compiled.tally`."""
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
        """Return what `Compiled.tally` found, put together."""
        reached, low, high = found
        # Of many elements equal to an end none were collected.
        low = low if self._many[0] and limits.low != limits.high else 0
        high = high if self._many[1] else 0
        ends = (limits.low, limits.high)
        piece = Counted(
            start, size, reached - high, inside, ends=ends, equal=(low, high), spare=limits.spare
        )
        # The bracket missed: what is collected is not to grow with the chunk.
        return piece.distinct() if len(inside) > MOST * size else piece

    def settle(self, pieces: Sequence[Counted]) -> None:
        """Find the cut if its value lies inside the bracket; its position may stay open.

        If not, set the bracket to where it must lie.

        Raises:
            ValueError: it is not a finite number.
        """
        import numpy as np

        if self.cut is not None or self._count is None:
            return
        if all(piece.counts is None for piece in pieces):
            self._rank(pieces, self._count)
            return
        whole = merge(pieces)
        self._many = (False, False)  # known of the sample's ends only
        # How many elements are at least as large as each value, the largest value first.
        reached = whole.above + np.cumsum(whole.counts[::-1])
        index = int(np.searchsorted(reached, self._count))
        if self._count <= whole.above:
            self._low, self._high = self._high, math.inf
        elif index == len(reached):
            if self._low == self._least:
                raise ValueError(_NOT_FINITE)
            self._low, self._high = self._least, self._low
        elif whole.rounded:
            # All that stands for the value, and nothing more: the next value may be far.
            value, high = whole.values[::-1][index], whole.values.dtype.type(self._high)
            end = np.array([min(int(bits(value)) + (1 << whole.spare), int(bits(high)))])
            end = end.astype(bits(value).dtype).view(value.dtype)
            self._low, self._high = float(value), float(end[0])
        else:
            self._found(whole.values[::-1][index], self._count - int(reached[index]), pieces)

    def _rank(self, pieces: Sequence[Counted], count: int) -> None:
        """Do as `settle`, from values as they were collected."""
        above, inside = (sum(getattr(p, name) for p in pieces) for name in ("above", "inside"))
        self._many = (False, False)
        if count <= above:
            self._low, self._high = self._high, math.inf
        elif count > above + inside:
            if self._low == self._least:
                raise ValueError(_NOT_FINITE)
            self._low, self._high = self._least, self._low
        else:
            value, reached = largest(pieces, count - above)
            self._found(value, count - above - reached, pieces)

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

    def positions(self, where: Callable[[int, float], Any], start: int) -> Any:
        """Return the numbers of the elements equal to the cut's value, in the chunk of its last.

        Args:
            where: (quantity, value) -> numbers of such elements, counted from the slice's first.
            start: number of that.
        """
        import numpy as np

        first, size = self.border or (0, 0)
        if self.cut is None or not first <= start < first + size:
            return np.zeros(0, np.int64)
        return where(self.quantity, self.cut.value) + start

    def locate(self, found: dict[tuple[int, int], Any]) -> None:
        """Set the cut's position from the numbers of the elements equal to it, by chunk."""
        if self.border is not None and self.cut is not None:
            self.cut = Cut(self.cut.value, int(found[self.border][self._equal - 1]))


def _ranks(values: Any) -> Callable[[float], Any]:
    """Return what gives the value of a rank, about 1 for the largest, of `values`."""
    import numpy as np

    size = values.size
    if kernels.loaded() and values.dtype == np.float32:
        from moeforge.kernels.counting import ranked

        return lambda rank: ranked(values, min(max(round(rank), 1), size))[0]
    ordered = np.sort(values)
    return lambda rank: ordered[size - min(max(round(rank), 1), size)]

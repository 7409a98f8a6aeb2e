"""Owns what a piece of a tensor holds around a bracket of magnitudes, and putting pieces together.

Few values inside the bracket are held as they come, unordered; of more, the distinct ones with
their counts; and where these are too many, neighbours are counted together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from moeforge import kernels

RESOLUTION = 13
"""Bits that values inside a bracket are told apart by in one pass, where there are too many."""


class Limits(NamedTuple):
    """Where magnitudes are counted, and where they are collected: from `first` on, below `stop`.

    Of those there may be too many distinct ones, unless `spare` low bits are dropped.
    """

    first: Any
    stop: Any
    low: Any
    high: Any
    spare: int


@dataclass(slots=True)
class Counted:
    """What a piece of the tensor holds: its range, elements above a bracket, and what is inside.

    Attributes:
        values: magnitudes inside the bracket, a numpy array: with `counts` the distinct ones,
            ascending; without them one for each element, in any order.
        counts: how often each occurs, int64; or None.
        ends: further values, and `equal`, how often each of them occurs; none with `counts`.
        spare: low bits of magnitudes that may be dropped so that few distinct values remain.
        rounded: whether they were, so that a value stands for several.
    """

    start: int
    size: int
    above: int
    values: Any
    counts: Any = None
    ends: tuple[Any, ...] = ()
    equal: tuple[int, ...] = ()
    spare: int = 0
    rounded: bool = False

    @property
    def inside(self) -> int:
        """Elements inside the bracket."""
        return len(self.values) + sum(self.equal) if self.counts is None else int(self.counts.sum())

    def equal_to(self, value: Any) -> int:
        """Return how many elements inside the bracket are equal to `value`."""
        import numpy as np

        if self.counts is not None:
            return int(self.counts[self.values == value].sum())
        more = (count for end, count in zip(self.ends, self.equal, strict=True) if end == value)
        if kernels.loaded() and self.values.dtype == np.float32:
            from moeforge.kernels.counting import equal

            return int(equal(self.values, np.float32(value))) + sum(more)
        return int(np.count_nonzero(self.values == value)) + sum(more)

    def distinct(self) -> Counted:
        """Return the same with distinct values."""
        import numpy as np

        if self.counts is not None:
            return self
        values, counts = np.unique(self.values, return_counts=True)
        ends = [(end, n) for end, n in zip(self.ends, self.equal, strict=True) if n]
        values = np.concatenate([values, np.array([end for end, _ in ends], values.dtype)])
        counts = np.concatenate([counts, np.array([n for _, n in ends], np.int64)])
        order = np.argsort(values, kind="stable")
        return replace(self, values=values[order], counts=counts[order], ends=(), equal=())


def inside_of(values: Any, first: Any, stop: Any) -> tuple[Any, int]:
    """Return those of `values` from `first` on and below `stop`; and how many are `stop` or more.

    All float32, or all float64; numpy.
    """
    import numpy as np

    if first >= stop:
        return values[:0], int(np.count_nonzero(values >= stop))
    if kernels.loaded() and values.dtype == np.float32:
        from moeforge.kernels.counting import ROOM, tally

        room = np.empty(values.size + ROOM, np.float32)
        reached, count = tally(values, first, stop, room)
        return room[:count], reached
    reaching = values >= stop
    within = values >= first
    within ^= reaching
    # Taking by number is several times faster than by a mask.
    return values.take(np.flatnonzero(within)), int(np.count_nonzero(reaching))


def bits(magnitudes: Any) -> Any:
    """Return the bits of magnitudes as integers, in the same order as the magnitudes."""
    import numpy as np

    return magnitudes.view(np.int32 if magnitudes.dtype == np.float32 else np.int64)


def merge(pieces: Sequence[Counted]) -> Counted:
    """Put what neighbouring pieces of a tensor hold together, as fine as the coarsest of them."""
    import numpy as np

    pieces = [piece.distinct() for piece in pieces]
    values = np.concatenate([piece.values for piece in pieces])
    rounded, spare = any(piece.rounded for piece in pieces), pieces[0].spare
    if rounded:
        values = (bits(values) >> spare << spare).view(values.dtype)
    values, place = np.unique(values, return_inverse=True)
    counts = np.zeros(len(values), np.int64)
    np.add.at(counts, place, np.concatenate([piece.counts for piece in pieces]))
    size, above = sum(piece.size for piece in pieces), sum(piece.above for piece in pieces)
    return Counted(pieces[0].start, size, above, values, counts, spare=spare, rounded=rounded)


def limit(most: int) -> Callable[[Sequence[Counted]], list[Counted]]:
    """Return a join of a chunk's pieces that holds about `most` values.

    Where there are more distinct ones, it holds no more than 2 ** RESOLUTION.
    """

    def many(pieces: Sequence[Counted]) -> bool:
        return sum(len(piece.values) for piece in pieces) > most

    def join(pieces: Sequence[Counted]) -> list[Counted]:
        pieces = [piece.distinct() for piece in pieces] if many(pieces) else list(pieces)
        if not many(pieces):
            return pieces
        whole = merge(pieces)
        if len(whole.values) > most and whole.spare:
            whole = merge([replace(whole, rounded=True)])
        return [whole]

    return join


def largest(pieces: Sequence[Counted], rank: int) -> tuple[Any, int]:
    """Return the value of rank `rank` among what lies inside the bracket in all of `pieces`.

    Args:
        pieces: none of them with distinct values.
        rank: 1 for the largest.

    Returns:
        The value; and how many, inside the bracket, are at least as large.
    """
    import numpy as np

    values = np.concatenate([piece.values for piece in pieces])
    ends = pieces[0].ends
    equal = [sum(piece.equal[i] for piece in pieces) for i in range(len(ends))]
    high = equal[1] if equal else 0
    if rank <= high:
        return ends[1], high
    if rank <= high + len(values):
        at = len(values) - (rank - high)
        if kernels.loaded() and values.dtype == np.float32:
            from moeforge.kernels.counting import ranked

            value, reached = ranked(values, rank - high)
        else:
            value = np.partition(values, at)[at]
            reached = int(np.count_nonzero(values >= value))
        return value, high + reached
    return ends[0], high + len(values) + equal[0]

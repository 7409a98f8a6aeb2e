"""Owns what a worker reads of its inputs: of each tensor a window of bytes as they are stored.

What was read is not held for a further pass over the tensor, nor are files mapped: both are slower
than reading again, for what is read lies in the cache then; see docs/performance.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from moeforge.engine import WINDOW
from moeforge.engine.buffers import Buffer, torch_dtype
from moeforge.plans import Plan, Read
from moeforge.sources import lies
from moeforge.system import open_file, read_at

if TYPE_CHECKING:
    from torch import Tensor

Key = tuple[str, str]
"""Source and name of a tensor."""


class _Window:
    """The part of one input tensor that was read last.

    Attributes:
        lent: whether a GPU may still be copying from it.
    """

    def __init__(self, *, pinned: bool) -> None:
        self.buffer = Buffer(WINDOW, pinned=pinned)
        self.start = self.end = 0
        self.lent = False


class Reader:
    """One worker's windows.

    Args:
        plan: holds the sources.
        pinned: whether a GPU copies from the windows.
        settle: waits until it has copied what it was lent.
    """

    def __init__(self, plan: Plan, *, pinned: bool, settle: Callable[[], None]) -> None:
        self._plan, self._pinned, self._settle = plan, pinned, settle
        self._windows: dict[Key, _Window] = {}
        self._free: list[_Window] = []
        self._end: dict[Key, int] = {}
        self._files: dict[Key, tuple[int, int] | None] = {}

    def __del__(self) -> None:
        self.close()

    def begin(self, reads: Iterable[Read], end: int | None) -> None:
        """Forget what was read so far.

        Args:
            reads: what is read next.
            end: element before which reading ends, so that nothing is read in vain beyond it; None
                where that is not known.
        """
        keys = {(read.source, read.name) for read in reads}
        self._free += [self._windows.pop(key) for key in list(self._windows) if key not in keys]
        for window in (*self._windows.values(), *self._free):
            window.start = window.end = 0
        self._end = dict.fromkeys(keys, end) if end is not None else {}

    def read(self, node: Read, start: int, count: int) -> Tensor:
        """Return elements [start, start + count) as they are stored, until the next are read.

        From pinned memory a GPU may still copy them later, if that is told by `lend`.
        """
        source = self._plan.sources[node.source]
        spec, key = source.specs()[node.name], (node.source, node.name)
        size, window = spec.dtype.itemsize, self._windows.get(key)
        if window is None:
            window = self._free.pop() if self._free else _Window(pinned=self._pinned)
            self._windows[key] = window
            window.start = window.end = 0
        if not window.start <= start <= start + count <= window.end:
            # As much as fits, but no more than will be wanted: what follows in this chunk.
            limit = min(self._end.get(key, start + count), spec.numel)
            ahead = max(count, min(WINDOW // size // count * count if count else 0, limit - start))
            if window.lent:
                self._settle()
            if window.buffer.size < ahead * size:
                window.buffer = Buffer(ahead * size, pinned=self._pinned)
            source.read(node.name, start * size, window.buffer.view(ahead * size))
            window.start, window.end = start, start + ahead
        first = (start - window.start) * size
        return window.buffer.tensor(torch_dtype(spec.dtype), count, first)

    def gather(self, node: Read, runs: Iterable[tuple[int, int]], out: memoryview) -> None:
        """Fill `out` with runs of bytes (start, count) of a tensor, one after the other.

        From the file itself where there is one, which stays open until `close`, and past windows:
        of many short runs, or of one slice after the other, much is the way through the sources.

        Raises:
            OSError: they cannot be read.
        """
        key, source, filled = (node.source, node.name), self._plan.sources[node.source], 0
        if key not in self._files:
            span = lies(source, node.name)
            opened = None if span is None else (open_file(span.path, os.O_RDONLY), span.offset)
            self._files[key] = opened
        file = self._files[key]
        for start, count in runs:
            part = out[filled : filled + count]
            filled += count
            if file is None or read_at(file[0], part, file[1] + start) < count:
                source.read(node.name, start, part)  # which says what is wrong, if anything is

    def close(self) -> None:
        """Close files that were read from: they may be deleted when a job is done."""
        for file in self._files.values():
            if file is not None:
                os.close(file[0])
        self._files.clear()

    def lend(self, node: Read) -> None:
        """Take note that a GPU copies what was read of `node`."""
        self._windows[node.source, node.name].lent = True

    def settled(self) -> None:
        """Take note that a GPU has copied everything."""
        for window in self._windows.values():
            window.lent = False

"""Owns the output files while they are written: each exists at its full size from the start."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from moeforge.output.layout import Shard


class OutputFiles:
    """Shard files, opened for writing at given offsets by several threads.

    Args:
        folder: where they are made.
        shards: their names, headers and sizes.
    """

    def __init__(self, folder: Path, shards: tuple[Shard, ...]) -> None:
        self._folder = folder
        self._shards = shards
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> OutputFiles:
        for shard in self._shards:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            descriptor = os.open(self._folder / shard.name, flags, 0o644)
            self._descriptors[shard.name] = descriptor
            os.truncate(descriptor, shard.nbytes)
            self.write(shard.name, memoryview(shard.header), 0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def descriptor(self, shard: str) -> int:
        """Return the open descriptor of file `shard`."""
        return self._descriptors[shard]

    def write(self, shard: str, data: memoryview, offset: int) -> None:
        """Write all of `data` at byte `offset` of file `shard`."""
        while data:
            count = os.pwrite(self._descriptors[shard], data, offset)
            data, offset = data[count:], offset + count

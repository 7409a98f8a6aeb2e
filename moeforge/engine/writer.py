"""Owns the output files while they are written: each exists at its full size from the start."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from moeforge.errors import BuildError, Finding
from moeforge.output.layout import Shard
from moeforge.shown import show_size
from moeforge.system import FULL, allocate, open_file, room_of, write_at


class OutputFiles:
    """Shard files, opened for writing at given offsets by several threads.

    Args:
        folder: where they are made.
        shards: their names, headers and sizes.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self._folder = folder
        self._shards = shards
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> OutputFiles:
        try:
            for shard in self._shards:
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
                descriptor = open_file(self._folder / shard.name, flags)
                self._descriptors[shard.name] = descriptor
                try:
                    allocate(descriptor, shard.nbytes)
                except OSError as error:
                    raise self._explain(error) from error
                self.write(shard.name, memoryview(shard.header), 0)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *ended: object) -> None:
        self._close()

    def _close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def write(self, shard: str, data: memoryview, offset: int) -> None:
        """Write all of `data` at byte `offset` of file `shard`.

        Raises:
            BuildError: the disk is full.
            OSError: it refuses for another reason.
        """
        while data:
            try:
                count = write_at(self._descriptors[shard], data, offset)
            except OSError as error:
                raise self._explain(error) from error
            data, offset = data[count:], offset + count

    def _explain(self, error: OSError) -> OSError | BuildError:
        if error.errno not in FULL:
            return error
        needed = sum(shard.nbytes for shard in self._shards)
        # What this build has taken already is not free any more, and counts as had.
        taken = sum(map(room_of, self._descriptors.values()))
        free = shutil.disk_usage(self._folder).free + taken
        where = self._folder.parent.parent
        what = (
            f"the disk is full: {len(self._shards)} files of {show_size(needed)} are to be "
            f"written, {where} has {show_size(free)} for them"
        )
        fix = "Free some, choose another disk with -o, or a smaller dtype. Nothing was published."
        return BuildError(Finding(what, fix))

"""Owns hashing the output files while they are written, and seeing them onto the disk.

Threads follow the part of each file that is complete, so that little is left when the last byte is
written; a file is sealed when all of it is hashed and the disk has it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from moeforge.engine.background import Background
from moeforge.engine.jobs import CopyJob, MergeJob, are_mostly_copies
from moeforge.errors import BuildError, Finding
from moeforge.hashes import BLAKE3, begin
from moeforge.output.layout import Shard
from moeforge.sealed import Sealed
from moeforge.system import begin_writing, open_file, read_at

_WINDOW, _AHEAD = 2**20, 2**25
"""Bytes hashed at a time; and those after which the disk is told to begin writing."""
_BEHIND = 2**26
"""Bytes that hashing may be behind copying before copies wait for it: what is hashed when all is
copied, by one thread for each file, is hashed while other cores have nothing to do."""
_POLL = 0.05


class Sealer(Background):
    """Threads that hash, and where nearly everything is copied, hold back those that copy.

    Args:
        folder: where the files are.
        shards: the files, in the order in which they are written.
        jobs: what is written, in the order of the files.
        threads: number of workers, and most files that are hashed at the same time.
        sealed: told each file as soon as it is sealed, by the thread that did it.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        jobs: Sequence[CopyJob | MergeJob],
        threads: int,
        sealed: Callable[[str, Sealed], None],
    ) -> None:
        self._folder, self._shards, self._told = folder, list(shards), sealed
        self._jobs: dict[str, list[CopyJob | MergeJob]] = {shard.name: [] for shard in shards}
        for job in jobs:
            self._jobs[job.shard].append(job)
        self._sizes = {shard.name: shard.nbytes for shard in shards}
        self._complete: set[int] = set()
        self._first = dict.fromkeys(self._jobs, 0)
        self._ends = dict.fromkeys(self._jobs, 0)
        # Headers are not counted: those of files whose turn has not come would hold back copies,
        # for ever where a copy before them has failed.
        self._behind = 0
        # One worker never waits, so that there is always something to hash. Those that compute
        # may be other processes, and take longer than hashing.
        self._spare = threads - 1 if are_mostly_copies(jobs) else 0
        super().__init__(max(1, min(threads, len(shards))))
        for name in self._jobs:
            self._move(name)
        self.result: dict[str, Sealed] = {}

    def complete(self, job: CopyJob | MergeJob) -> None:
        """Say that all bytes of `job` are written; of copies, return when more are wanted."""
        with self._change:
            self._complete.add(id(job))
            self._behind += self._move(job.shard)
            self._change.notify_all()
            if self._spare:
                self._spare -= 1
                self._change.wait_for(lambda: self._behind <= _BEHIND or self._stop or self._error)
                self._spare += 1

    def finish(self, meanwhile: Callable[[], None] = lambda: None) -> dict[str, Sealed]:
        """Wait until every file is sealed.

        Args:
            meanwhile: called now and then.

        Raises:
            BuildError: a file cannot be read back, or does not get onto the disk.
        """
        for thread in self._threads:
            while thread.is_alive():
                thread.join(_POLL)
                self.check()
                meanwhile()
        self.check()
        return self.result

    def __exit__(self, *ended: object) -> None:
        super().__exit__(*ended)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _work(self) -> None:
        while True:
            with self._change:
                if self._stop or not self._shards:
                    return
                shard = self._shards.pop(0)
            found = self._follow(shard)
            if found is None:
                return
            self.result[shard.name] = found
            self._told(shard.name, found)

    def _move(self, name: str) -> int:
        """Find out how far file `name` is complete; return how many bytes more that is."""
        jobs, first = self._jobs[name], self._first[name]
        while first < len(jobs) and id(jobs[first]) in self._complete:
            first += 1
        self._first[name], before = first, self._ends[name]
        self._ends[name] = jobs[first].offset if first < len(jobs) else self._sizes[name]
        return self._ends[name] - before

    def _written(self, shard: Shard, known: int) -> int | None:
        """Wait until more than `known` bytes are complete; return how many, None to stop."""
        with self._change:
            self._change.wait_for(lambda: self._ends[shard.name] > known or self._stop)
            return None if self._stop else self._ends[shard.name]

    def _hashed(self, count: int) -> None:
        """Let copies go on that have waited for this."""
        with self._change:
            self._behind -= count
            if self._behind <= _BEHIND < self._behind + count:
                self._change.notify_all()

    def _follow(self, shard: Shard) -> Sealed | None:
        path, digest, done = self._folder / shard.name, begin(BLAKE3), 0
        buffer = memoryview(bytearray(_WINDOW))
        descriptor = open_file(path, os.O_RDWR)
        try:
            while done < shard.nbytes:
                end = self._written(shard, done)
                if end is None:
                    return None
                begun = done
                while done < end and not self._stop:
                    count = read_at(descriptor, buffer[: end - done], done)
                    if not count:
                        raise OSError(f"{shard.name} is shorter than what was written to it")
                    digest.update(buffer[:count])
                    done += count
                    self._hashed(count)
                    if done - begun >= _AHEAD or done == end:
                        begin_writing(descriptor, begun, done - begun)
                        begun = done
                if self._stop:
                    return None
            os.fsync(descriptor)
        except OSError as error:
            what = f"{path.name} does not get onto the disk: {error.strerror or error}"
            raise BuildError(Finding(what, "Check the disk. Nothing was published.")) from error
        finally:
            os.close(descriptor)
        return Sealed(digest.hexdigest(), shard.nbytes)

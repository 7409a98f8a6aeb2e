"""Owns hashing the output files while they are written, and seeing them onto the disk.

Threads follow the part of each file that is complete, so that little is left when the last byte is
written; a file is sealed when all of it is hashed and the disk has it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from moeforge.engine.jobs import CopyJob, MergeJob
from moeforge.errors import BuildError, Finding
from moeforge.hashes import BLAKE3, begin
from moeforge.output.layout import Shard
from moeforge.sealed import Sealed
from moeforge.system import begin_writing, open_file, read_at

_WINDOW, _AHEAD = 2**18, 2**25
"""Bytes hashed at a time; and those after which the disk is told to begin writing."""
_POLL = 0.05


class Sealer:
    """Threads that hash; they are not started before worker processes are forked.

    Args:
        folder: where the files are.
        shards: the files, in the order in which they are written.
        jobs: what is written, in the order of the files.
        threads: most files that are hashed at the same time.
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
        self._complete: set[int] = set()
        self._first = dict.fromkeys(self._jobs, 0)
        self._change = threading.Condition()
        self._error: BaseException | None = None
        self._stop = False
        self._threads = [
            threading.Thread(target=self._work, daemon=True)
            for _ in range(max(1, min(threads, len(shards))))
        ]
        self.result: dict[str, Sealed] = {}

    def start(self) -> None:
        """Begin to follow what is written."""
        for thread in self._threads:
            thread.start()

    def complete(self, job: CopyJob | MergeJob) -> None:
        """Say that all bytes of `job` are written."""
        with self._change:
            self._complete.add(id(job))
            self._change.notify_all()

    def check(self) -> None:
        """Raise what went wrong in a thread, if anything did."""
        if self._error is not None:
            raise self._error

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

    def __enter__(self) -> Sealer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._change:
            self._stop = True
            self._change.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _work(self) -> None:
        try:
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
        except BaseException as error:
            self._error = error

    def _written(self, shard: Shard, known: int) -> int | None:
        """Wait until more than `known` bytes are complete; return how many, None to stop."""
        jobs = self._jobs[shard.name]
        with self._change:
            while not self._stop:
                first = self._first[shard.name]
                while first < len(jobs) and id(jobs[first]) in self._complete:
                    first += 1
                self._first[shard.name] = first
                end = jobs[first].offset if first < len(jobs) else shard.nbytes
                if end > known or end == shard.nbytes:
                    return end
                self._change.wait()
        return None

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

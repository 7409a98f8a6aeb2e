"""Owns bringing the files of Hub inputs while tensors are made of those that are here already.

A thread fetches the files in the order in which jobs want them; a job waits for its own. With
eviction a file is removed from the cache when no job wants it any more, and not many are fetched
ahead, so that the disk need never hold all inputs.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence

from moeforge.engine.background import Background
from moeforge.engine.jobs import CopyJob, MergeJob, Report
from moeforge.plans import Plan
from moeforge.sources import Fetched, streamed

_POLL = 0.01

Job = CopyJob | MergeJob
Progress = Callable[[int, int], None]
"""Told bytes that have come, and all that are to come."""


class Fetcher(Background):
    """What jobs want of the Hub, and the thread that brings it.

    It is not waited for at the end: a download that goes on then ends with the process at last.

    Args:
        plan: holds the sources.
        jobs: about in the order in which they are begun; a job that waits is served first.
        evict: remove files that this fetched, or an earlier read of the same source, when no job
            wants them any more.
        progress: told of the bytes, by the thread.
    """

    def __init__(self, plan: Plan, jobs: Sequence[Job], *, evict: bool, progress: Progress) -> None:
        self._files: list[tuple[Fetched, str]] = []
        self._evict, self._progress = evict, progress
        numbers: dict[tuple[str, str], int] = {}
        self._wants: dict[int, tuple[int, ...]] = {}
        for job in jobs:
            wanted = []
            for read in job.reads():
                source = streamed(plan.sources[read.source])
                if source is None:
                    continue
                at = (read.source, source.file_of(read.name))
                if at not in numbers:
                    numbers[at] = len(self._files)
                    self._files.append((source, at[1]))
                wanted.append(numbers[at])
            self._wants[id(job)] = tuple(dict.fromkeys(wanted))
            if wanted:
                job.ready = self._waiting(job)
        self._users = [0] * len(self._files)
        for wanted_by in self._wants.values():
            for number in wanted_by:
                self._users[number] += 1
        sources = {id(source) for source, _ in self._files}
        self._most = max(map(len, self._wants.values()), default=0) + len(sources)
        # Shared, for worker processes wait as well; made before they are forked.
        self._here = multiprocessing.RawArray("b", max(len(self._files), 1))
        self._asked = multiprocessing.RawArray("b", max(len(self._files), 1))
        for number, (source, file) in enumerate(self._files):
            self._here[number] = source.has(file)
        missing = [(s, f) for n, (s, f) in enumerate(self._files) if not self._here[n]]
        self._total, self._done = sum(source.size_of(file) for source, file in missing), 0
        self._kept = 0
        super().__init__(1 if self._files else 0)

    def complete(self, job: Job) -> None:
        """Say that a job is done."""
        with self._change:
            for number in self._wants[id(job)]:
                self._users[number] -= 1
                if self._evict and not self._users[number]:
                    source, file = self._files[number]
                    source.evict(file)
                    self._kept -= 1
            self._change.notify_all()

    def _waiting(self, job: Job) -> Callable[[Report], None]:
        parent = os.getpid()

        def wait(report: Report) -> None:
            if self._evict and os.getpid() != parent:
                # A worker of its own, which reads for one job at a time.
                for source in {id(source): source for source, _ in self._files}.values():
                    mine = [self._files[number] for number in self._wants[id(job)]]
                    source.close({file for other, file in mine if other is source})
            while missing := [n for n in self._wants[id(job)] if not self._here[n]]:
                for number in missing:
                    self._asked[number] = 1
                self.check()
                report(0)
                time.sleep(_POLL)

        return wait

    def _next(self, left: list[int]) -> int | None:
        """Return the file to fetch next: one that a job waits for, or the first, if there is room.

        Without eviction there always is. With it, no more than a job wants, and one for each
        source, are brought before anybody asks for them.
        """
        asked = next((number for number in left if self._asked[number]), None)
        if asked is None and (not self._evict or self._kept < self._most):
            return left[0]
        return asked

    def _work(self) -> None:
        left = [number for number in range(len(self._files)) if not self._here[number]]
        self._kept = len(self._files) - len(left)
        while left:
            with self._change:
                # Looked at again and again: other processes ask without a word.
                while not self._stop and (number := self._next(left)) is None:
                    self._change.wait(_POLL)
                if self._stop:
                    return
                assert number is not None
                self._kept += 1
            left.remove(number)
            source, file = self._files[number]
            source.fetch(file, self._came)
            self._here[number] = 1

    def _came(self, count: int) -> None:
        if self._stop:
            raise InterruptedError
        self._done += count
        self._progress(min(self._done, self._total), self._total)

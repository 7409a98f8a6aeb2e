"""Owns the workers: threads that take chunks of jobs until all is done or one fails."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from moeforge.engine.failures import explain
from moeforge.engine.jobs import Job

if TYPE_CHECKING:
    from moeforge.engine.evaluate import Evaluator

_POLL = 0.1
"""Seconds between two reports of the progress."""

Chunk = Callable[["Evaluator | None", Callable[[int], None]], None]


class Pool:
    """A queue of chunks; the last worker of a phase puts the next phase in front.

    Args:
        workers: number of threads; the only one is the calling thread.
        progress: called by the thread that calls `run`, with the bytes written so far.
        complete: told each job that is done, by the thread that did the last of it.
    """

    def __init__(
        self,
        workers: int,
        progress: Callable[[int], None],
        complete: Callable[[Any], None] = lambda job: None,
    ) -> None:
        self._workers = workers
        self._complete = complete
        self._progress = progress
        self._jobs: Iterator[Job] = iter(())
        self._queue: deque[tuple[Job, Chunk]] = deque()
        self._pending: dict[int, int] = {}
        self._change = threading.Condition()
        self._error: BaseException | None = None
        self._stop = False
        self._done = 0
        self._told = time.monotonic()

    def run(self, jobs: Sequence[Job], make_state: Callable[[], Evaluator | None]) -> None:
        """Do all `jobs`.

        Args:
            jobs: what to do; taken in this order.
            make_state: called once in each worker; what it returns is handed to its chunks.

        Raises:
            BuildError: a chunk failed; says which tensor.
        """
        self._jobs = iter(jobs)
        if self._workers == 1:
            # Not in a thread of its own: processes forked later could not multiply, see `workers`.
            self._work(make_state)
        else:
            self._share(make_state)
        if self._error is not None:
            raise self._error
        self._progress(self._done)

    def _share(self, make_state: Callable[[], Evaluator | None]) -> None:
        threads = [
            threading.Thread(target=self._work, args=(make_state,), daemon=True)
            for _ in range(self._workers)
        ]
        for thread in threads:
            thread.start()
        try:
            while running := [thread for thread in threads if thread.is_alive()]:
                running[0].join(_POLL)
                self._progress(self._done)
        finally:
            with self._change:
                self._stop = True
                self._change.notify_all()
            for thread in threads:
                thread.join()

    def _push(self, job: Job, *, front: bool) -> None:
        chunks = [(job, chunk) for chunk in job.chunks()]
        self._pending[id(job)] = len(chunks)
        if front:
            self._queue.extendleft(reversed(chunks))
        else:
            self._queue.extend(chunks)

    def _report(self, count: int) -> None:
        with self._change:
            self._done += count
            if self._stop:
                raise InterruptedError
        if self._workers == 1 and time.monotonic() - self._told > _POLL:
            self._told = time.monotonic()
            self._progress(self._done)

    def _work(self, make_state: Callable[[], Evaluator | None]) -> None:
        job: Job | None = None
        try:
            state = make_state()
            while (item := self._next()) is not None:
                job, chunk = item
                chunk(state, self._report)
                with self._change:
                    self._pending[id(job)] -= 1
                    last = not self._pending[id(job)]
                if last:
                    self._advance(job)
        except KeyboardInterrupt:  # of the only worker, which is the thread that was asked
            raise
        except BaseException as error:
            with self._change:
                if self._error is None and not self._stop:
                    self._error = explain(error, job)
                self._stop = True
                self._change.notify_all()

    def _advance(self, job: Job) -> None:
        # What a phase found is put together here, while the other workers go on with other jobs.
        more = job.advance()
        if not more:
            self._complete(job)
        with self._change:
            del self._pending[id(job)]
            if more:
                self._push(job, front=True)
            self._change.notify_all()

    def _next(self) -> tuple[Job, Chunk] | None:
        with self._change:
            while not self._stop:
                if self._queue:
                    return self._queue.popleft()
                # Divided when it is its turn: the chunks of all would be a million, or several.
                if (job := next(self._jobs, None)) is not None:
                    self._push(job, front=False)
                    continue
                if not self._pending:
                    return None
                self._change.wait()
            return None

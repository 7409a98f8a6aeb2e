"""Owns worker processes: each takes whole jobs until all are done or one fails.

Threads do not do: arithmetic on slices that fit the cache holds Python's lock about half the time,
and two threads of it take as long as one. Forked workers share the plan, the open files and the
pages of the interpreter; each job is done by one of them from start to end.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

from moeforge.engine.failures import explain
from moeforge.engine.jobs import Job
from moeforge.errors import BuildError, Finding
from moeforge.system import FORKS, held_back, let_through

if TYPE_CHECKING:
    from moeforge.engine.evaluate import Evaluator

_POLL = 0.05
"""Seconds between two looks at the progress."""
_ASKED_TO_STOP = [signal.SIGINT, signal.SIGTERM]

AVAILABLE = FORKS
"""Elsewhere a process with torch in it cannot be forked safely, or not at all."""


def run(
    jobs: Sequence[Job],
    make_state: Callable[[], Evaluator],
    workers: int,
    progress: Callable[[int], None],
    started: Callable[[], None] = lambda: None,
    complete: Callable[[Any], None] = lambda job: None,
) -> None:
    """Do all `jobs`: the few that are large first, the others in their order.

    Args:
        jobs: what to do.
        make_state: called once in each worker; what it returns is handed to its chunks.
        workers: number of processes.
        progress: called by this process, with the bytes written so far.
        started: called when all workers are forked; threads may be started from then on.
        complete: told each job that is done.

    Raises:
        BuildError: a job failed, or a worker was killed; says which tensor, or which signal.
    """
    context = multiprocessing.get_context("fork")
    taken, done = context.Value("q", 0), context.RawArray("q", workers)
    failures = context.SimpleQueue()
    finished = context.RawArray("b", len(jobs))
    order = order_of(jobs, workers)
    shared = (jobs, order, make_state, taken, done, finished, failures, os.getpid())
    processes = [
        context.Process(target=_work, args=(number, *shared), daemon=True)
        for number in range(workers)
    ]
    try:
        with warnings.catch_warnings():
            # Python warns of forking beside threads; ours only draw the progress.
            warnings.simplefilter("ignore", DeprecationWarning)
            # Held back until a worker has said that it leaves Ctrl-C to its parent.
            with held_back(*_ASKED_TO_STOP):
                for process in processes:
                    process.start()
        started()
        running, looked, begun = list(processes), 0, list[int]()
        while running:
            wait([process.sentinel for process in running], _POLL)
            progress(sum(done))
            # Asked before the jobs: what a worker has finished is known once it has ended.
            running = [process for process in running if process.exitcode is None]
            # Only what was taken can be finished: a look must not cost more where jobs are many.
            # Without the lock, for a worker that was killed may hold it.
            until = min(taken.get_obj().value, len(order))
            begun, looked = begun + order[looked:until], until
            ended = {number for number in begun if finished[number]}
            for number in [n for n in begun if n in ended]:
                complete(jobs[number])
            begun = [number for number in begun if number not in ended]
            if any(process.exitcode for process in processes):
                break
        if not failures.empty():
            kind, findings = failures.get()
            raise kind(*findings)
        for process in processes:
            if process.exitcode:
                raise BuildError(_killed(process.exitcode))
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def order_of(jobs: Sequence[Job], workers: int) -> list[int]:
    """Return the numbers of `jobs` in the order in which they are taken.

    A large one at the end would leave the other workers idle; else files are completed one after
    the other, so that they can be hashed meanwhile.
    """
    large = sum(job.size for job in jobs) / (8 * workers)
    first = [n for n, job in enumerate(jobs) if job.size > large]
    first.sort(key=lambda number: -jobs[number].size)
    return [*first, *(n for n, job in enumerate(jobs) if job.size <= large)]


def _killed(code: int) -> Finding:
    if code < 0:
        what = f"a worker process was ended by {signal.Signals(-code).name}"
        fix = "If memory ran out, use fewer --threads or --memory. Nothing was published."
        return Finding(what, fix)
    return Finding(f"a worker process ended with {code}", "Nothing was published.")


def _work(
    number: int,
    jobs: Sequence[Job],
    order: Sequence[int],
    make_state: Callable[[], Evaluator],
    taken: Any,
    done: Any,
    finished: Any,
    failures: Any,
    parent: int,
) -> None:
    """Take jobs until none is left; run in a worker process."""
    for asked in _ASKED_TO_STOP:
        signal.signal(asked, signal.SIG_IGN)  # the parent decides
    let_through(*_ASKED_TO_STOP)

    def report(count: int) -> None:
        done[number] += count
        if os.getppid() != parent:  # it was killed: nobody wants the result
            os._exit(1)

    job: Job | None = None
    try:
        state = make_state()
        while True:
            with taken.get_lock():
                place = taken.value
                taken.value += 1
            if place >= len(order):
                return
            job = jobs[order[place]]
            more = True
            while more:
                for chunk in job.chunks():
                    chunk(state, report)
                    report(0)
                more = job.advance()
            finished[order[place]] = 1
    except BaseException as error:
        failure = explain(error, job)
        failures.put((type(failure), getattr(failure, "findings", (str(failure),))))
        os._exit(1)

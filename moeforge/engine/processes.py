"""Owns worker processes: each takes whole jobs until all are done or one fails.

Threads do not do: arithmetic on slices that fit the cache holds Python's lock about half the time,
and two threads of it take as long as one. Forked workers share the plan, the open files and the
pages of the interpreter; each job is done by one of them from start to end.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

from moeforge.engine.jobs import Job
from moeforge.engine.pool import explain
from moeforge.errors import BuildError, Finding

if TYPE_CHECKING:
    from moeforge.engine.evaluate import Evaluator

_POLL = 0.1
"""Seconds between two looks at the progress."""

AVAILABLE = sys.platform == "linux"
"""Elsewhere a process with torch in it cannot be forked safely, or not at all."""


def run(
    jobs: Sequence[Job],
    make_state: Callable[[], Evaluator],
    workers: int,
    progress: Callable[[int], None],
) -> None:
    """Do all `jobs`, the largest first.

    Args:
        jobs: what to do.
        make_state: called once in each worker; what it returns is handed to its chunks.
        workers: number of processes.
        progress: called by this process, with the bytes written so far.

    Raises:
        BuildError: a job failed, or a worker was killed; says which tensor, or which signal.
    """
    context = multiprocessing.get_context("fork")
    taken, done = context.Value("q", 0), context.RawArray("q", workers)
    failures = context.SimpleQueue()
    order = sorted(range(len(jobs)), key=lambda number: -jobs[number].size)
    shared = (jobs, order, make_state, taken, done, failures, os.getpid())
    processes = [
        context.Process(target=_work, args=(number, *shared), daemon=True)
        for number in range(workers)
    ]
    try:
        with warnings.catch_warnings():
            # Python warns of forking beside threads; ours only draw the progress.
            warnings.simplefilter("ignore", DeprecationWarning)
            # Held back until a worker has said that it leaves Ctrl-C to its parent.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            try:
                for process in processes:
                    process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        running = list(processes)
        while running:
            wait([process.sentinel for process in running], _POLL)
            progress(sum(done))
            running = [process for process in running if process.exitcode is None]
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
    failures: Any,
    parent: int,
) -> None:
    """Take jobs until none is left; run in a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])

    def report(count: int) -> None:
        done[number] += count
        if os.getppid() != parent:  # it was killed: nobody wants the result
            os._exit(1)

    name = ""
    try:
        state = make_state()
        while True:
            with taken.get_lock():
                place = taken.value
                taken.value += 1
            if place >= len(order):
                return
            job = jobs[order[place]]
            name = job.name
            more = True
            while more:
                for chunk in job.chunks():
                    chunk(state, report)
                    report(0)
                more = job.advance()
    except BaseException as error:
        failure = explain(error, name)
        failures.put((type(failure), getattr(failure, "findings", (str(failure),))))
        os._exit(1)

"""Owns running a command to its end: its seconds, and its memory where somebody looks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """One command: wall-clock and CPU seconds, and peak memory in bytes.

    `peak` is that of the largest process, `together` of all at the same time (proportional set
    size); both are zero where nobody looked.
    """

    seconds: float
    cpu: float
    peak: int
    together: int


def _descendants(root: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents.setdefault(int(fields[1]), []).append(int(entry.name))
            except (OSError, IndexError):
                continue
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += parents.get(pid, [])
    return found


def _memory(pid: int) -> tuple[int, int]:
    """Return the highest resident size of a process so far, and its proportional set size now.

    The kernel's figure after the end (ru_maxrss) would include what forked it.
    """

    def said(file: str, key: str) -> int:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

    try:
        return said("status", "VmHWM:"), said("smaps_rollup", "Pss:")
    except (OSError, StopIteration):
        return 0, 0


def timed(command: list[str], cwd: Path, look: float | None = None, **env: str) -> Run:
    """Run a command; a failure ends everything.

    Args:
        command: what to run.
        cwd: where.
        look: seconds between two looks at its memory; None takes none, for a look walks through the
            pages of the processes and would take its part of the time that is measured.
        env: added to the environment.
    """
    most = [0, 0]
    with open(cwd / "log.txt", "w") as log:
        began = time.perf_counter()
        child = subprocess.Popen(
            command, cwd=cwd, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **env}
        )
        stop = threading.Event()

        def watch() -> None:
            while look and not stop.wait(look):
                peaks, sizes = zip(*map(_memory, _descendants(child.pid)), strict=True)
                most[:] = max(most[0], *peaks), max(most[1], sum(sizes))

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        stop.set()
        watcher.join()
    if child.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{(cwd / 'log.txt').read_text()[-3000:]}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, *most)

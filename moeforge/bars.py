"""Owns the progress that Python callers see: a line in a terminal, bars in a notebook.

The command line has its own, see `cli.shared`. Nothing is drawn unless a caller asks with
`progress=True`, and nothing where nobody looks: in files, pipes and logs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from html import escape
from importlib import import_module
from typing import Any

Progress = Callable[[str, int, int], None]
"""Called with the phase, what is done of it, and all of it."""
Count = Callable[[int, int], None]
"""The same of what has a single phase."""

_SECONDS = 0.1
"""Between two drawings."""
_WIDTH = 30


def watched(progress: Progress | bool) -> Progress:
    """Return what draws if `progress` is true; a function as it is.

    Args:
        progress: what the caller of the library gave.
    """
    if callable(progress):
        return progress
    return _drawing() if progress else lambda phase, done, total: None


def counted(progress: Count | bool, phase: str) -> Count:
    """Return the same for work that has one phase.

    Args:
        progress: what the caller of the library gave.
        phase: what to call it.
    """
    if callable(progress):
        return progress
    told = watched(progress)
    return lambda done, total: told(phase, done, total)


def _drawing() -> Progress:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if hasattr(shell, "kernel"):
        return _Drawn(_Page())
    return _Drawn(_Line()) if sys.stderr.isatty() else watched(False)


class _Drawn:
    """Draws not more often than eyes follow, and always what is finished."""

    def __init__(self, draw: Callable[[dict[str, float]], None]) -> None:
        self._draw, self._last, self._shares = draw, 0.0, dict[str, float]()

    def __call__(self, phase: str, done: int, total: int) -> None:
        new, share = phase not in self._shares, done / total if total else 1.0
        finished = share >= 1 > self._shares.get(phase, 0.0)
        self._shares[phase] = share
        now = time.monotonic()
        if new or finished or (share < 1 and now - self._last >= _SECONDS):
            self._last = now
            self._draw(self._shares)


class _Line:
    """One line for each phase, written over until it is finished."""

    def __init__(self) -> None:
        self._ended = set[str]()

    def __call__(self, shares: dict[str, float]) -> None:
        phase, share = next((p, s) for p, s in reversed(shares.items()) if p not in self._ended)
        full = round(_WIDTH * share)
        line = f"\r{phase:<16}{'#' * full}{'.' * (_WIDTH - full)} {share:4.0%}"
        ends = share >= 1
        if ends:
            self._ended.add(phase)
        print(line, end="\n" if ends else "", file=sys.stderr, flush=True)


class _Page:
    """A bar for each phase, below the cell; ipywidgets are not needed."""

    def __init__(self) -> None:
        self._shown: Any = None

    def __call__(self, shares: dict[str, float]) -> None:
        display: Any = import_module("IPython.display")
        rows = "".join(
            f"<tr><td>{escape(phase)}</td><td><progress max=1 value={share:.3f}></progress></td>"
            f"<td>{share:.0%}</td></tr>"
            for phase, share in shares.items()
        )
        page = display.HTML(f"<table>{rows}</table>")
        if self._shown is None:
            self._shown = display.display(page, display_id=True)
        else:
            self._shown.update(page)

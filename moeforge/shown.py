"""Owns that results show themselves: in one line in Python, as tables in a notebook.

What they look like is known above, where tables are made: see `showing`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Shown:
    """A result with a short `repr`, which a notebook shows as the tables of its command."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {_showing().line(self)}>"

    def _repr_html_(self) -> str:
        return str(_showing().html(self))


def show_size(count: int) -> str:
    """Return a number of bytes for people: 1.23 GB."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def _showing() -> Any:
    # By name: it imports those who import this.
    return import_module("moeforge.showing")

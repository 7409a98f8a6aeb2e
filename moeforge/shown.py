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
    """Return a number of bytes for people, in three digits: 1.23 GB."""
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * size:  # 999.7 MB are 1 GB in three digits
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def _showing() -> Any:
    # By name: it imports those who import this.
    return import_module("moeforge.showing")

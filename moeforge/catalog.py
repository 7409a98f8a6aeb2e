"""Finds the entries of a shelf (methods, families, gates) by file name, without importing them.

The word in the recipe is the name of the file: there is no registry and no import side effect.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent


@cache
def names(shelf: str) -> tuple[str, ...]:
    """Return the entries of `shelf`, sorted; files that start with `_` are helpers."""
    files = (_ROOT / shelf).glob("*.py")
    return tuple(sorted(file.stem for file in files if not file.stem.startswith("_")))


@cache
def load(shelf: str, name: str, attribute: str) -> Any:
    """Import entry `name` of `shelf` and return its `attribute` (METHOD, FAMILY or GATE)."""
    return getattr(import_module(f"moeforge.{shelf}.{name}"), attribute)

"""moeforge makes one language model out of several.

`build`, `plan` and `check` do what the commands of the same names do; what they raise is in
`moeforge.errors`.
"""

from __future__ import annotations

from typing import Any

from moeforge.version import __version__

__all__ = ["__version__", "build", "check", "plan"]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `moeforge --help` need not wait for any of it.
    if name in ("build", "check", "plan"):
        from moeforge import forge

        return getattr(forge, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

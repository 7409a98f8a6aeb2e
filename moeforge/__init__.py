"""moeforge makes one language model out of several.

`build`, `plan`, `check`, `verify`, `rebuild`, `diff`, `push`, `extract`, `experts` and `upcycle` do
what the commands of the same names do; what they raise is in `moeforge.errors`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeforge.version import __version__

if TYPE_CHECKING:
    from moeforge.forge import build, check, plan
    from moeforge.proof.diff import diff
    from moeforge.proof.verify import verify
    from moeforge.publishing import push
    from moeforge.rebuilding import rebuild
    from moeforge.surgery import experts, extract, upcycle

__all__ = [
    "__version__",
    "build",
    "check",
    "diff",
    "experts",
    "extract",
    "plan",
    "push",
    "rebuild",
    "upcycle",
    "verify",
]

_HOMES = {
    "build": "moeforge.forge",
    "check": "moeforge.forge",
    "diff": "moeforge.proof.diff",
    "experts": "moeforge.surgery",
    "extract": "moeforge.surgery",
    "plan": "moeforge.forge",
    "push": "moeforge.publishing",
    "rebuild": "moeforge.rebuilding",
    "upcycle": "moeforge.surgery",
    "verify": "moeforge.proof.verify",
}


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `moeforge --help` need not wait for any of it.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

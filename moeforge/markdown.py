"""Owns how words stand in Markdown, those of others as what they are, never as markup."""

from __future__ import annotations

import re
from collections.abc import Sequence

from moeforge.errors import visible

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|!~&$])")
_RUN = re.compile(r"`+")


def plain(text: str) -> str:
    """Return `text` as one line that Markdown shows as it is."""
    return _SPECIAL.sub(r"\\\1", visible(" ".join(text.split())))


def code(text: str) -> str:
    """Return `text` as code in a line or in a cell of a table."""
    line = visible(" ".join(text.split())).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, _RUN.findall(line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def block(text: str, language: str) -> str:
    """Return `text` as a block of code that nothing in it can end."""
    fence = "`" * max(3, 1 + max(map(len, _RUN.findall(text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def shortened(text: str, most: int) -> str:
    """Return the first `most` characters of a text, with dots where more follow."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1].rstrip()}…"


def amount(count: int) -> str:
    """Return a number of parameters for people: 1.23 B, 851 M, 940 k."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)

"""The one tree of errors: each says what, where and what to do next, and has an exit code.

Nothing here prints or exits; `moeforge.cli` does both.

    MoeforgeError            1
    ├── RecipeError          2   the recipe does not say something that can be done
    ├── SourceError          3   a model that the recipe names cannot be used
    ├── PlanError            4   the models do not fit together
    ├── BuildError           5   reading, computing or writing failed
    └── HubError             6   the Hugging Face Hub said no
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

Path = tuple["str | int", ...]
"""Where a value stands in a recipe: keys and list indices from the root."""


def show_path(path: Path) -> str:
    """Write a path as `$.experts[1].source_model`."""
    return "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that `word` probably means, if any comes near it."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), None)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` — did you mean "x"?` for the known word nearest to `word`, or an empty string."""
    found = closest(word, known)
    return f' — did you mean "{found}"?' if found else ""


def visible(text: str) -> str:
    """Return `text` with escapes for all that would act on a terminal instead of being seen.

    Names of tensors, tokens and files come from strangers.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or worth knowing.

    Attributes:
        what: the fact, naming the thing and its value.
        fix: what to do next; may be empty.
        path: where in the recipe; empty where it is about none of its values.
        line: line in the recipe file, from 1; 0 where unknown.
        warning: of things worth knowing, one that probably harms the result.
    """

    what: str
    fix: str = ""
    path: Path = ()
    line: int = 0
    warning: bool = False

    def as_data(self) -> dict[str, object]:
        """Return it as plain data for JSON."""
        return {
            "what": self.what,
            "fix": self.fix,
            "path": list(self.path),
            "line": self.line or None,
            "warning": self.warning,
        }

    def __str__(self) -> str:
        places = [f"line {self.line}"] if self.line else []
        places += [show_path(self.path)] if self.path else []
        where = f"{', '.join(places)}: " if places else ""
        fix = f"\n    {self.fix}" if self.fix else ""
        return visible(f"{where}{self.what}{fix}")


def out_of_memory(error: BaseException) -> bool:
    """Say whether `error` means that memory is short: Python's, torch's, or a device's."""
    named = type(error).__name__ in ("OutOfMemoryError", "MemoryError")
    return named or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


class MoeforgeError(Exception):
    """Base of all errors that moeforge raises on purpose; carries one or more findings."""

    exit_code = 1

    def __init__(self, *findings: Finding | str) -> None:
        self.findings = tuple(Finding(f) if isinstance(f, str) else f for f in findings)
        super().__init__("\n".join(str(f) for f in self.findings))


class RecipeError(MoeforgeError):
    """The recipe is not one: unknown keys, wrong types, impossible values."""

    exit_code = 2


class SourceError(MoeforgeError):
    """A model is missing, damaged, or of a kind that cannot be read."""

    exit_code = 3


class PlanError(MoeforgeError):
    """The models are fine but do not fit together as the recipe asks."""

    exit_code = 4


class BuildError(MoeforgeError):
    """Reading, computing or writing failed; nothing was published."""

    exit_code = 5


class HubError(MoeforgeError):
    """The Hugging Face Hub could not be reached or refused."""

    exit_code = 6

"""Owns what a check of a checkpoint comes to: fine, failed or skipped, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from moeforge.errors import Finding
from moeforge.shown import Shown

OK, FAILED, SKIPPED = "ok", "failed", "skipped"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what: files, values, lock, special ids, chat template, config, load, tokenizer,
            forward.
        state: "ok", "failed" or "skipped".
        detail: what was found, or why it was skipped.
        findings: what is wrong; those of a check that is fine are worth knowing only.
    """

    name: str
    state: str
    detail: str = ""
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, repr=False)
class Verified(Shown):
    """All checks of a folder.

    Attributes:
        folder: where the checkpoint is.
        checks: in the order of their names' list above.
        seconds: wall-clock time.
    """

    folder: Path
    checks: tuple[Check, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.errors

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What is wrong."""
        return tuple(f for c in self.checks if c.state == FAILED for f in c.findings)

    @property
    def notes(self) -> tuple[Finding, ...]:
        """What is worth knowing, and what was not looked at."""
        told = [f for c in self.checks if c.state == OK for f in c.findings]
        skipped = [
            f"{c.name} was not checked: {c.detail}" for c in self.checks if c.state == SKIPPED
        ]
        return (*told, *map(Finding, skipped))


def judged(name: str, findings: Iterable[Finding], detail: str = "") -> Check:
    """Return a check that failed if there are findings, and is fine otherwise."""
    found = tuple(findings)
    return Check(name, FAILED, f"{len(found)} wrong", found) if found else Check(name, OK, detail)


def skipped(reason: str, *names: str) -> list[Check]:
    """Return checks that could not be made."""
    return [Check(name, SKIPPED, reason) for name in names]

"""Owns the verdict on a build, for `check` and `build` alike: which of what is known stops it.

With `--strict` every warning that comes before work starts does: of the plan, of prompts and
tokenizers, of short memory, and of the engine that `check --target` asks about.
"""

from __future__ import annotations

from dataclasses import dataclass

from moeforge.checking.needs import Needs
from moeforge.errors import BuildError, Finding, MoeforgeError, PlanError
from moeforge.prepare import Prepared

Findings = tuple[Finding, ...]


@dataclass(frozen=True)
class Verdict:
    """What stands against a build, and what is only to be told.

    Attributes:
        errors: stop it.
        notes: do not, warnings among them.
        kind: of the first of the errors.
    """

    errors: Findings
    notes: Findings
    kind: type[MoeforgeError]

    def heeded(self) -> Findings:
        """Return the notes.

        Raises:
            MoeforgeError: with the errors, if there are any.
        """
        if self.errors:
            raise self.kind(*self.errors)
        return self.notes


def judge(
    prepared: Prepared,
    needs: Needs,
    target: tuple[Findings, Findings] = ((), ()),
    *,
    strict: bool,
) -> Verdict:
    """Judge what is known before a build.

    Args:
        prepared: what is to be built.
        needs: what that takes here.
        target: errors and notes of the engine that is to read it.
        strict: warnings are errors.
    """
    errors, notes = target
    short = tuple(needs.errors())
    kind = BuildError if short and not errors else PlanError
    notes = (*prepared.notes(), *notes, *needs.warnings())
    harmful = tuple(note for note in notes if note.warning and strict)
    if harmful:
        notes = tuple(note for note in notes if not note.warning)
    return Verdict((*errors, *short, *harmful), notes, kind)

"""Owns `check`: everything that can be said of a recipe before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeforge import recipe as recipes
from moeforge import targets
from moeforge.checking.compatibility import Comparison, compare
from moeforge.checking.needs import Needs, needs_of
from moeforge.checking.verdict import judge
from moeforge.engine import Settings
from moeforge.errors import Finding, MoeforgeError
from moeforge.plans import Plan
from moeforge.prepare import Prepared, planner_for, prepare_with
from moeforge.shown import Shown


@dataclass(frozen=True, repr=False)
class Report(Shown):
    """What is known before a build: `errors` stop it, `notes` do not.

    Attributes:
        errors: what stands against it.
        notes: what is worth knowing, warnings among it.
        plan: what would be made; None where there are errors in recipe or models.
        exit_code: of the first kind of error; 0 without one.
        compared: the models side by side; None where there are fewer than two.
        needs: what the build takes; None where there is no plan.
        prepared: recipe, planner and plan; None where there is no plan.
    """

    errors: tuple[Finding, ...]
    notes: tuple[Finding, ...]
    plan: Plan | None
    exit_code: int
    compared: Comparison | None = None
    needs: Needs | None = None
    prepared: Prepared | None = None


def check(
    recipe: str | Path | dict[str, Any],
    out: str | Path | None = None,
    *,
    target: str | None = None,
    device: str = "cpu",
    strict: bool = False,
    offline: bool = False,
) -> Report:
    """Say what stands against building a recipe, without raising.

    Args:
        recipe: path of a YAML file, or the same as a dict.
        out: output folder; the recipe's stem in the working directory if None.
        target: another engine, one of `targets.TARGETS`, that is to read the output.
        device: torch device of the arithmetic.
        strict: warnings are errors.
        offline: use only what is in the local Hub cache.
    """
    planner = None
    try:
        if target:
            targets.named(target)
        loaded = recipes.load(recipe)
        planner = planner_for(loaded, offline=offline)
        prepared = prepare_with(loaded, planner)
    except MoeforgeError as error:
        compared = compare(planner.opened) if planner else None
        return Report(error.findings, (), None, error.exit_code, compared)
    plan = prepared.plan
    reader = targets.report(plan, target) if target else ((), ())
    folder = Path(out if out is not None else loaded.stem)
    taken = needs_of(prepared, folder, Settings(device=device))
    found = judge(prepared, taken, reader, strict=strict)
    code = found.kind.exit_code if found.errors else 0
    compared = compare(planner.opened)
    return Report(found.errors, found.notes, plan, code, compared, taken, prepared)

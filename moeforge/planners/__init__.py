"""Owns planning: a recipe and the headers of its models become a Plan, or all mistakes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from moeforge.errors import Finding, MoeforgeError, Path, PlanError, SourceError
from moeforge.planners.merge import plan_merge
from moeforge.planners.model import HEAD, Findings, Model, from_source
from moeforge.planners.moe import plan_moe
from moeforge.planners.stack import plan_stack
from moeforge.plans import Plan
from moeforge.recipe import MergeRecipe, MoeRecipe, Recipe, Reference, StackRecipe
from moeforge.sources import Source

Open = Callable[[Reference], Source]

__all__ = ["Model", "Planner"]


@dataclass
class Planner:
    """Plans one recipe; every model is opened once.

    Attributes:
        open_source: opens a reference of the recipe.
    """

    open_source: Open
    findings: Findings = field(default_factory=Findings)
    notes: Findings = field(default_factory=Findings)
    failures: list[MoeforgeError] = field(default_factory=list)
    _models: dict[Reference, Model | None] = field(default_factory=dict)
    _inline: int = 0

    def plan(self, recipe: Recipe) -> Plan:
        """Return the plan of `recipe`.

        Raises:
            SourceError, HubError: a model cannot be used; the first kind met, with all findings.
            PlanError: the models do not fit together; with all findings.
        """
        plan = self._plan(recipe)
        if self.failures:
            found = [finding for error in self.failures for finding in error.findings]
            raise type(self.failures[0])(*found, *self.findings)
        if self.findings or plan is None:
            raise PlanError(*self.findings)
        return plan

    def _plan(self, recipe: Recipe) -> Plan | None:
        if isinstance(recipe, MoeRecipe):
            return plan_moe(recipe, self.model, (), self.findings, self.notes)
        model = self._inner(recipe, ())
        if model is None:
            return None
        kind = "stack" if isinstance(recipe, StackRecipe) else "merge"
        return Plan(
            kind,
            tuple(model.tensors.values()),
            model.config,
            model.sources,
            model.donor,
            left_out=model.left_out,
            notes=tuple(self.notes),
        )

    def _inner(self, recipe: Recipe, path: Path) -> Model | None:
        if isinstance(recipe, StackRecipe):
            return plan_stack(recipe, self.model, path, self.findings, self.notes)
        assert isinstance(recipe, MergeRecipe)
        return plan_merge(recipe, self.model, path, self.findings, self.notes)

    def model(self, entry: Any, path: Path) -> Model | None:
        """Return the model that `entry` of the recipe means; None after reporting a failure."""
        if not isinstance(entry, Reference):
            model = self._inner(entry, path)
            if model is None:
                return None
            self._inline += 1
            return replace(model, label=f"{model.label} #{self._inline}")
        if entry not in self._models:
            self._models[entry] = self._open(entry, path)
        return self._models[entry]

    def _open(self, entry: Reference, path: Path) -> Model | None:
        try:
            model = from_source(self.open_source(entry))
            if model.tied and model.config.get("tie_word_embeddings") is False:
                what = f"{entry} lacks {HEAD}, and its config.json says that it has its own head"
                raise SourceError(Finding(what, "Download or export it again."))
            return model
        except MoeforgeError as error:
            placed = (Finding(f.what, f.fix, path) for f in error.findings)
            self.failures.append(type(error)(*placed))
        except OSError as error:
            self.failures.append(
                SourceError(Finding(f"{entry} cannot be read: {error}", path=path))
            )
        return None

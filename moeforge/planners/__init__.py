"""Owns planning: a recipe and the headers of its models become a Plan, or all mistakes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from moeforge.errors import Finding, MoeforgeError, Path, PlanError, SourceError
from moeforge.planners.account import accounted
from moeforge.planners.adapters import apply_adapter
from moeforge.planners.combine import Seed
from moeforge.planners.extract import plan_extract
from moeforge.planners.merge import plan_merge
from moeforge.planners.model import HEAD, Findings, Model, from_source
from moeforge.planners.modules import plan_modules
from moeforge.planners.moe import plan_moe
from moeforge.planners.regroup import idle, plan_regroup
from moeforge.planners.stack import plan_stack
from moeforge.plans import Plan
from moeforge.recipe import (
    Adapter,
    ExtractRecipe,
    MergeRecipe,
    ModulesRecipe,
    MoeRecipe,
    Recipe,
    Reference,
    RegroupRecipe,
    StackRecipe,
)
from moeforge.sources import Source

Open = Callable[["Reference | Adapter"], Source]

__all__ = ["Model", "Planner"]

_KINDS: dict[type[Recipe], str] = {
    StackRecipe: "stack",
    ExtractRecipe: "extraction",
    RegroupRecipe: "regrouping",
}
"""What the plan of a recipe is called; a merge otherwise."""


@dataclass
class _Draws:
    """Seeds of a recipe that gives one and of the inline recipes in it, which get numbers."""

    seed: int
    inline: int = 0

    def next(self) -> Seed:
        """Return the seed of the next inline recipe without a seed of its own."""
        self.inline += 1
        return self.seed, self.inline


@dataclass
class Planner:
    """Plans one recipe; every model is opened once.

    Attributes:
        open_source: opens a reference of the recipe, or an adapter.
    """

    open_source: Open
    findings: Findings = field(default_factory=Findings)
    notes: Findings = field(default_factory=Findings)
    failures: list[MoeforgeError] = field(default_factory=list)
    _models: dict[tuple[int, str], Model | None] = field(default_factory=dict)
    _draws: _Draws = field(default_factory=lambda: _Draws(0))
    _inline: int = 0

    @property
    def opened(self) -> tuple[Model, ...]:
        """Every model that the recipe refers to and that could be used; a mixture's base first."""
        models = {
            model.label: model
            for (draws, _), model in self._models.items()
            if draws == 0 and model is not None
        }
        return tuple(models.values())

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
        return accounted(plan)

    def _plan(self, recipe: Recipe) -> Plan | None:
        self._draws = _Draws(getattr(recipe, "seed", 0) or 0)
        if isinstance(recipe, MoeRecipe):
            return plan_moe(recipe, self.model, (), self.findings, self.notes)
        model = self._combined(recipe, (), (self._draws.seed, 0), self._draws)
        if model is None:
            return None
        return Plan(
            _KINDS.get(type(recipe), "merge"),
            tuple(model.tensors.values()),
            model.config,
            model.sources,
            model.donor,
            tokenizer=model.tokenizer,
            left_out=model.left_out,
            notes=tuple(self.notes),
            idle=idle(model) if isinstance(recipe, RegroupRecipe) else 0,
        )

    def _combined(self, recipe: Recipe, path: Path, seed: Seed, draws: _Draws) -> Model | None:
        def resolve(entry: Any, here: Path) -> Model | None:
            return self.model(entry, here, draws)

        notes = self.notes
        if isinstance(recipe, ExtractRecipe):
            return plan_extract(recipe, resolve, path, self.findings, notes)
        if isinstance(recipe, RegroupRecipe):
            return plan_regroup(recipe, resolve, path, self.findings)
        if isinstance(recipe, StackRecipe):
            return plan_stack(recipe, resolve, path, self.findings, notes, seed)
        if isinstance(recipe, ModulesRecipe):
            return plan_modules(recipe, resolve, path, self.findings, notes, seed)
        assert isinstance(recipe, MergeRecipe)
        return plan_merge(recipe, resolve, path, self.findings, notes, seed)

    def model(self, entry: Any, path: Path, draws: _Draws | None = None) -> Model | None:
        """Return the model that `entry` of the recipe means; None after reporting a failure.

        The same words in two places are the same model, random masks included.

        Args:
            entry: a Reference or an inline recipe.
            path: where it stands.
            draws: seeds of the recipe around it; those of the whole recipe if None.
        """
        draws = draws or self._draws
        key = (0 if isinstance(entry, Reference) else id(draws), repr(entry))
        if key not in self._models:
            if not isinstance(entry, Reference):
                self._models[key] = self._inner(entry, path, draws)
            else:
                self._models[key] = self._referenced(entry, path, draws)
        return self._models[key]

    def _inner(self, recipe: Recipe, path: Path, draws: _Draws) -> Model | None:
        own = getattr(recipe, "seed", None)
        seed = draws.next() if own is None else (own, 0)
        model = self._combined(recipe, path, seed, draws if own is None else _Draws(own))
        if model is None:
            return None
        self._inline += 1
        return replace(model, label=f"{model.label} #{self._inline}")

    def _referenced(self, entry: Reference, path: Path, draws: _Draws) -> Model | None:
        if entry.lora is None:
            return self._opened(entry, path)
        bare = entry.model
        if not isinstance(bare, Recipe):
            bare = entry.model_copy(update={"lora": None})
        model = self.model(bare, path, draws)
        adapter = self._try(entry.lora, path, self.open_source)
        if model is None or adapter is None:
            return None
        return apply_adapter(model, adapter, self.findings, path)

    def _opened(self, entry: Reference, path: Path) -> Model | None:
        def read(reference: Any) -> Model:
            model = from_source(self.open_source(reference))
            has_head = any(name.endswith("head.weight") for name in model.tensors)
            if model.tied and not has_head and model.config.get("tie_word_embeddings") is False:
                what = f"{entry} lacks {HEAD}, and its config.json says that it has its own head"
                raise SourceError(Finding(what, "Download or export it again."))
            return model

        model: Model | None = self._try(entry, path, read)
        if model is not None and entry.override_architecture:
            architectures = [entry.override_architecture]
            model = replace(model, config={**model.config, "architectures": architectures})
        for note in model.notes if model is not None else ():
            self.notes.error(note.what, note.fix, path)
        return model

    def _try(self, entry: Any, path: Path, act: Callable[[Any], Any]) -> Any:
        """Return what `act` makes of `entry`, or None after noting why it cannot."""
        try:
            return act(entry)
        except MoeforgeError as error:
            placed = (Finding(f.what, f.fix, path) for f in error.findings)
            self.failures.append(type(error)(*placed))
        except OSError as error:
            self.failures.append(
                SourceError(Finding(f"{entry} cannot be read: {error}", path=path))
            )
        return None

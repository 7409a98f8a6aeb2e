"""Owns what a recipe's `evaluate` asks for: which models are compared with the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from moeforge.planners import Model, Planner
from moeforge.planners.model import from_source
from moeforge.planners.vocab import tokens_of
from moeforge.plans import Plan
from moeforge.recipe import MoeRecipe, Recipe, average
from moeforge.weights import Weights

if TYPE_CHECKING:
    from torch import nn

    from moeforge.proof.heldout import HeldOut


def _loader(model: Model) -> Callable[[], nn.Module]:
    def load() -> nn.Module:
        from moeforge.forward import load_dense

        return load_dense(model.config, model.tensors, Weights(model).stored)

    return load


def _parts(planner: Planner, recipe: Recipe, plan: Plan) -> dict[str, Model]:
    """Return the models that the result is compared with by label: its parts and their average.

    Losses per token compare only where the tokens are the same: inputs with another tokenizer than
    the result's are left out.
    """
    if not isinstance(recipe, MoeRecipe):
        models = {key: from_source(source) for key, source in plan.sources.items() if source.config}
        models = {key: model for key, model in models.items() if model.layers.count}
        changed = plan.tokenizer.tokens if plan.tokenizer else None
        if changed is None:
            return models
        return {k: model for k, model in models.items() if tokens_of(model).ids == changed.ids}
    experts = [model for expert in recipe.experts for model in expert.models]
    models = {}
    for entry in (recipe.base_model, *experts):
        model = planner.model(entry, ("evaluate",))
        assert model is not None, "it was planned before"
        models[model.label] = model
    mean = planner.model(average(experts), ("evaluate",))
    # Experts that cannot be averaged, for another vocabulary say, still make a mixture.
    return models if mean is None else {**models, "average of the experts": mean}


def evaluate_result(
    planner: Planner,
    recipe: Recipe,
    plan: Plan,
    work: Path,
    texts: Mapping[str, Path],
    progress: Callable[[str, int, int], None],
) -> tuple[HeldOut, nn.Module]:
    """Measure the result in folder `work`, and what it was made of, on held-out `texts`.

    Returns:
        What was measured, and the result, which is in memory in float32.

    Raises:
        BuildError: a text is too short, or transformers does not load the result cleanly.
    """
    from dataclasses import replace

    from moeforge.gates._tokenize import load_tokenizer
    from moeforge.proof.heldout import load_output, measure, routing

    result: list[nn.Module] = []

    def load_result() -> nn.Module:
        result.append(load_output(work, code=bool(plan.code)))
        return result[0]

    models = {label: _loader(model) for label, model in _parts(planner, recipe, plan).items()}
    label = "mixture" if plan.experts else plan.kind
    models[label] = load_result
    tokenizer = load_tokenizer(work)
    report, windows = measure(
        texts, tokenizer, models, lambda done, total: progress("held-out text", done, total)
    )
    progress("held-out text", len(models), len(models))
    if not plan.experts:
        return report, result[0]
    shares = {domain: routing(result[0], ids) for domain, ids in windows.items()}
    return replace(report, experts=plan.experts.labels, routing=shares), result[0]

"""Owns mixtures of experts: a recipe and its models become a plan, or all mistakes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from moeforge import families
from moeforge.configs import n_layers
from moeforge.dense import hidden_size, mlp_width
from moeforge.errors import Path
from moeforge.families import Family, Mixture
from moeforge.planners import remote
from moeforge.planners.copies import warn_of_copies
from moeforge.planners.fit import fits, report_extra, unlike
from moeforge.planners.homes import Home, choose, in_words_of
from moeforge.planners.mixture import DOWN, Assembly, Views, check_base, check_expert
from moeforge.planners.model import Findings, Model
from moeforge.planners.parts import ExpertParts, Parts
from moeforge.plans import Plan, PlannedTensor
from moeforge.recipe import Expert, MoeRecipe

Resolve = Callable[[object, Path], Model | None]


def plan_moe(
    recipe: MoeRecipe, resolve: Resolve, path: Path, findings: Findings, notes: Findings
) -> Plan | None:
    """Plan a mixture of experts; None where something was found wrong."""
    before = len(findings)
    base = resolve(recipe.base_model, (*path, "base_model"))
    wanted = _Wanted(recipe, resolve, path, findings, notes)
    experts = wanted.experts("experts", recipe.experts, base)
    shared = wanted.experts("shared_experts", recipe.shared_experts, base)
    if base is None or not _has_sizes(base, findings, (*path, "base_model")):
        return None
    try:
        sparse = recipe.sparse(n_layers(base.config) or 0)
    except ValueError as error:
        findings.error(str(error), "Layers count from 0.", (*path, "layers"))
        return None
    whole = [expert for expert in experts if expert is not None]
    whole_shared = [expert for expert in shared if expert is not None]
    complete = len(whole) == len(experts) and len(whole_shared) == len(shared)
    if not whole:
        return None
    # Widths are of the models as they are; zeros may be added to them below.
    mixture = Mixture(
        len(whole),
        recipe.experts_per_token,
        0,
        sparse,
        sum(mlp_width(expert.models[sparse.index(True)].config) for expert in whole_shared),
    )
    mixture = replace(mixture, width=_common_width(base, whole, recipe, findings))
    where = "base_model" if recipe.architecture == "auto" else "architecture"
    home = choose(base.config, recipe.architecture, mixture, findings, (*path, where))
    if home is None:
        return None
    for note in home.notes:
        notes.error(note, path=(*path, where))
    parts = Parts(recipe, base, tuple(whole), tuple(whole_shared), mixture, home.considered)
    if home.family is None:
        plan = remote.plan(parts, findings, notes, path)
    else:
        plan = _plan_native(parts, home, home.family, findings, notes, path)
    return plan if complete and len(findings) == before else None


def _plan_native(
    parts: Parts, home: Home, family: Family, findings: Findings, notes: Findings, path: Path
) -> Plan | None:
    """Plan a mixture in the layout of a family."""
    before, views = len(findings), Views(family)
    check_base(parts, family, views, findings, (*path, "base_model"))
    layers = [layer for layer, sparse in enumerate(parts.mixture.sparse) if sparse]
    for expert in (*parts.experts, *parts.shared):
        for model in expert.distinct:
            served = [layer for layer in layers if expert.models[layer] is model]
            kind = str(model.config.get("model_type"))
            if kind in family.accepts:
                check_expert(model, served, family, views, findings, expert.path)
                mine, theirs = views(parts.base), views(model)
                outside = (name for name in theirs if ".mlp." not in name)
                report_extra(parts.base, mine, model, outside, findings, expert.path)
                continue
            others = [each for e in (*parts.experts, *parts.shared) for each in e.distinct]
            findings.error(*unlike(parts.base, model, others), expert.path)
    if len(findings) > before:
        return None
    dense = in_words_of(family, parts.base.config)
    mixture = replace(parts.mixture, width=_real_width(parts, views, layers, findings))
    if len(findings) > before:
        return None
    if family.shared:
        step = family.shared.step(dense, mixture)
        if mixture.shared:
            mixture = replace(mixture, shared=-(-mixture.shared // step) * step)
        elif family.shared.needed:
            mixture = replace(mixture, shared=family.shared.zero_width(dense, mixture))

    def mlp_of(model: Model, layer: int) -> dict[str, PlannedTensor]:
        mine, stem = views(model), f"model.layers.{layer}.mlp."
        return {rest: mine[stem + rest] for rest in family.mlp if stem + rest in mine}

    warn_of_copies(parts, mlp_of, notes)
    return Assembly(replace(parts, mixture=mixture), family, views).plan(home, notes)


def _real_width(parts: Parts, views: Views, layers: list[int], findings: Findings) -> int:
    """Return the width that all experts get, from the tensors: configs do not tell it everywhere.

    MLPs of a base whose layers are of unequal width are all filled up; an expert's that is not as
    wide as the base's of the same layer is reported, unless zeros may be added.
    """

    def width(model: Model, layer: int) -> int | None:
        down = views(model).get(f"model.layers.{layer}.mlp.{DOWN}")
        return down.spec.shape[1] if down else None

    own = {layer: width(parts.base, layer) for layer in layers}
    widest = max((w for w in own.values() if w is not None), default=0)
    for expert in parts.experts:
        widths = {layer: width(expert.models[layer], layer) or 0 for layer in layers}
        widest = max(widest, *widths.values())
        wrong = [layer for layer in layers if own[layer] not in (None, widths[layer])]
        said = any(finding.path == expert.path for finding in findings)
        if wrong and not said and not parts.recipe.pad_experts:
            first = wrong[0]
            what = f"MLP {first} of {expert.label} is {widths[first]} wide, the base's {own[first]}"
            fix = "Use fine-tunes of the base, or pad_experts: true to fill up with zeros."
            findings.error(what, fix, expert.path)
    return widest


def _has_sizes(base: Model, findings: Findings, path: Path) -> bool:
    """Say whether the base's config has the sizes that everything else is told from."""
    absent = [] if hidden_size(base.config) else ["hidden_size"]
    absent += [] if n_layers(base.config) else ["num_hidden_layers"]
    # Types that have a home call it so; what such a config leaves out it has lost.
    if families.candidates(str(base.config.get("model_type"))):
        heads = base.config.get("num_attention_heads")
        absent += [] if isinstance(heads, int) else ["num_attention_heads"]
    if absent:
        kind = base.config.get("model_type", "without model_type")
        what = f"the config.json of {base.label} ({kind}) does not say {', '.join(absent)}"
        findings.error(what, "Give a decoder-only language model such as llama or qwen3.", path)
    return not absent


def _common_width(
    base: Model,
    experts: list[ExpertParts],
    recipe: MoeRecipe,
    findings: Findings,
) -> int:
    """Return the width that all experts get; report those that differ unless zeros may be added."""
    own = widest = mlp_width(base.config)
    for expert in experts:
        for model in expert.distinct:
            width = mlp_width(model.config)
            if width != own and not recipe.pad_experts:
                what = f"{model.label} has intermediate_size {width}, {base.label}"
                fix = "Use fine-tunes of the base, or pad_experts: true to fill up with zeros."
                findings.error(f"{what} has {own}", fix, expert.path)
            widest = max(widest, width)
    return widest


class _Wanted:
    """Finds the models of experts and reports those that do not fit the base."""

    def __init__(
        self, recipe: MoeRecipe, resolve: Resolve, path: Path, findings: Findings, notes: Findings
    ) -> None:
        self._resolve, self._path = resolve, path
        self._findings, self._notes = findings, notes

    def experts(
        self, word: str, entries: tuple[Expert, ...], base: Model | None
    ) -> list[ExpertParts | None]:
        """Return each expert of one list of the recipe, or None after reporting why not."""
        return [
            self._expert(entry, base, (*self._path, word, i, "source_model"))
            for i, entry in enumerate(entries)
        ]

    def _expert(self, entry: Expert, base: Model | None, path: Path) -> ExpertParts | None:
        if not isinstance(entry.source_model, tuple):
            model = self._fitting(entry.source_model, base, path)
            if model is None or base is None:
                return None
            return ExpertParts(entry, path, model.label, (model,) * (n_layers(base.config) or 0))
        found = [
            self._fitting(part.model, base, (*path, i, "model"))
            for i, part in enumerate(entry.source_model)
        ]
        if base is None or None in found:
            return None
        by_layer: dict[int, Model] = {}
        for i, (part, model) in enumerate(zip(entry.source_model, found, strict=True)):
            assert model is not None
            self._spread(part.layer_range, model, base, by_layer, (*path, i, "layer_range"))
        depth = n_layers(base.config) or 0
        if missing := [layer for layer in range(depth) if layer not in by_layer]:
            what = f"no model is given for layer {missing[0]}"
            self._findings.error(what, f"Let the ranges cover all {depth} layers.", path)
            return None
        models = tuple(by_layer[layer] for layer in range(depth))
        labels = list(dict.fromkeys(model.label for model in models))
        return ExpertParts(entry, path, " | ".join(labels), models)

    def _spread(
        self, span: tuple[int, int], model: Model, base: Model, taken: dict[int, Model], path: Path
    ) -> None:
        """Give the layers of `span` to `model`; report a range that is wrong."""
        (start, end), depth = span, n_layers(base.config) or 0
        if not 0 <= start < end <= depth:
            what = f"layer_range [{start}, {end}], but the base has {depth} layers"
            fix = f"Valid: 0 to {depth}, the end is exclusive and after the start."
            self._findings.error(what, fix, path)
        elif twice := [layer for layer in range(start, end) if layer in taken]:
            what = f"layer {twice[0]} is given twice, to {taken[twice[0]].label} and {model.label}"
            self._findings.error(what, "Let the ranges not overlap.", path)
        else:
            taken.update(dict.fromkeys(range(start, end), model))

    def _fitting(self, entry: object, base: Model | None, path: Path) -> Model | None:
        """Return the model of `entry` if it is of the base's kind and shape; report why not."""
        model = self._resolve(entry, path)
        if model is None or base is None:
            return model
        return model if fits(base, model, self._findings, self._notes, path) else None

"""Owns merges of whole models and stacks of layer ranges: a recipe and its models become a Model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moeforge.configs import Config, LayerFieldError, n_layers, portable, restack
from moeforge.errors import Path
from moeforge.plan import PlannedTensor
from moeforge.planners.combine import Combiner, Slot, missing_tensors
from moeforge.planners.model import (
    EMBEDDINGS,
    HEAD,
    Findings,
    Model,
    differences,
    is_input,
    listing,
)
from moeforge.recipe import MergeRecipe, Slice, StackRecipe
from moeforge.recipe.parameters import Scope

Resolve = Callable[[Any, Path], "Model | None"]
"""Turns a model of the recipe into a Model; None where that failed and was reported."""


def _untie(models: Sequence[Model]) -> list[Model]:
    """Give tied models a head of their own where another input has one."""
    if all(model.tied for model in models) or not any(model.tied for model in models):
        return list(models)
    return [
        replace(
            model,
            tensors={**model.tensors, HEAD: replace(model.tensors[EMBEDDINGS], name=HEAD)},
        )
        if model.tied
        else model
        for model in models
    ]


def _finish_config(config: Config, tensors: Sequence[PlannedTensor], dtype: str | None) -> Config:
    """Write the dtype, and whether the head is tied, as the tensors have it."""
    config = portable(config, dtype)
    names = {tensor.name for tensor in tensors}
    if (EMBEDDINGS in names and "tie_word_embeddings" in config) or HEAD in names:
        config["tie_word_embeddings"] = HEAD not in names
    return config


def _note_differences(models: Sequence[Model], notes: Findings, path: Path) -> None:
    for other in models[1:]:
        facts = ("rope_theta", "rms_norm_eps", "hidden_act")
        for sentence in differences(models[0], other, facts).values():
            notes.error(f"{sentence}; the result keeps the first", path=path)


def plan_merge(
    recipe: MergeRecipe, resolve: Resolve, path: Path, findings: Findings, notes: Findings
) -> Model | None:
    """Plan a merge of whole models; None where something was found wrong."""
    models = [resolve(e.model, (*path, "models", i, "model")) for i, e in enumerate(recipe.models)]
    owns = [
        Scope(entry.parameters, (*path, "models", i, "parameters"))
        for i, entry in enumerate(recipe.models)
    ]
    base = None
    if recipe.base_model is not None:
        named = [entry.model for entry in recipe.models]
        if recipe.base_model in named:
            base = named.index(recipe.base_model)
        else:  # mergekit appends it as one more input, for every method
            base = len(models)
            models.append(resolve(recipe.base_model, (*path, "base_model")))
            owns.append(Scope({}, (*path, "base_model")))
    for i, entry in enumerate(recipe.models):
        if any(entry.model == other.model for other in recipe.models[:i]):
            what = f"{entry.model} is listed twice"
            findings.error(what, "List it once, with its weights added up.", (*path, "models", i))
    scope = Scope(recipe.parameters, (*path, "parameters"))
    combiner = Combiner(
        recipe.merge_method, recipe.out_dtype or recipe.dtype, path, findings, notes
    )
    combiner.check_scopes([scope], per_input=False)
    combiner.check_scopes(owns[: len(recipe.models)], per_input=True)
    inputs = [model for model in models if model is not None]
    if len(inputs) < len(models):
        return None
    combiner.check_inputs(inputs, base, path)
    donor = inputs[base if base is not None else 0]
    _note_differences([donor, *(m for m in inputs if m is not donor)], notes, path)
    depths = {model.label: n_layers(model.config) for model in inputs}
    if len(set(depths.values())) > 1:
        said = ", ".join(f"{label} has {depth} layers" for label, depth in depths.items())
        findings.error(said, "Merge models of one depth, or stack them with slices.", path)
    if findings:
        return None
    inputs = _untie(inputs)
    layers = inputs[0].layers
    tensors = []
    for name in missing_tensors(inputs, findings, path):
        place = layers.split(name)
        position = (place[0] / (layers.count - 1) if layers.count > 1 else 1.0) if place else 0.0
        slots = [Slot(model, name, own) for model, own in zip(inputs, owns, strict=True)]
        tensors.append(combiner.tensor(name, slots, [scope], base, position))
    combiner.finish()
    planned = [tensor for tensor in tensors if tensor is not None]
    config = _finish_config(donor.config, planned, recipe.out_dtype or recipe.dtype)
    return _assemble(f"{recipe.merge_method} merge", config, planned, donor, inputs)


def _assemble(
    label: str,
    config: Config,
    tensors: Sequence[PlannedTensor],
    donor: Model,
    inputs: Sequence[Model],
) -> Model:
    return Model(
        label,
        config,
        {tensor.name: tensor for tensor in tensors},
        donor.donor,
        {key: source for model in inputs for key, source in model.sources.items()},
        {
            f"{model.label}: {name}": reason
            for model in inputs
            for name, reason in model.left_out.items()
        },
    )


@dataclass(frozen=True)
class _Part:
    """A slice with its models, and where it stands in recipe and output."""

    entry: Slice
    models: list[Model]
    base: int | None
    path: Path
    first: int

    @property
    def length(self) -> int:
        start, end = self.entry.sources[0].layer_range
        return end - start

    def slots(self, name: Callable[[int], str]) -> list[Slot]:
        return [
            Slot(model, name(i), Scope(source.parameters, (*self.path, "sources", i, "parameters")))
            for i, (model, source) in enumerate(zip(self.models, self.entry.sources, strict=True))
        ]

    @property
    def scope(self) -> Scope:
        return Scope(self.entry.parameters, (*self.path, "parameters"))


def _check_ranges(entry: Slice, models: Sequence[Model], path: Path, findings: Findings) -> None:
    lengths = set()
    for i, (source, model) in enumerate(zip(entry.sources, models, strict=True)):
        start, end = source.layer_range
        here = (*path, "sources", i, "layer_range")
        count = model.layers.count
        lengths.add(end - start)
        if not model.layers.stem:
            what = f"{model.label}: no numbered layers found that match its config"
            findings.error(what, "Only models made of layers can be stacked.", here)
        elif start < 0 or end > count:
            what = f"layer_range [{start}, {end}], but {model.label} has {count} layers"
            findings.error(what, f"Valid: 0 to {count}, the end is exclusive.", here)
        elif end <= start:
            what = f"layer_range [{start}, {end}] is empty"
            findings.error(what, f"For layer {start} alone write [{start}, {start + 1}].", here)
    if len(lengths) > 1:
        spans = ", ".join(str(list(source.layer_range)) for source in entry.sources)
        findings.error(f"the layer ranges of one slice differ in length: {spans}", path=path)


def plan_stack(
    recipe: StackRecipe, resolve: Resolve, path: Path, findings: Findings, notes: Findings
) -> Model | None:
    """Plan a stack of layer ranges; None where something was found wrong.

    Embeddings come from the sources of the first slice, final norm and head from the last slice's.
    """
    scope = Scope(recipe.parameters, (*path, "parameters"))
    combiner = Combiner(
        recipe.merge_method, recipe.out_dtype or recipe.dtype, path, findings, notes
    )
    combiner.check_scopes([scope], per_input=False)
    global_base = (
        resolve(recipe.base_model, (*path, "base_model")) if recipe.base_model is not None else None
    )
    parts: list[_Part] = []
    first = 0
    for i, entry in enumerate(recipe.slices):
        here = (*path, "slices", i)
        found = [
            resolve(source.model, (*here, "sources", j, "model"))
            for j, source in enumerate(entry.sources)
        ]
        models = [model for model in found if model is not None]
        if len(models) < len(found):
            continue
        named = [source.model for source in entry.sources]
        wanted = entry.base_model if entry.base_model is not None else recipe.base_model
        base = named.index(wanted) if wanted is not None and wanted in named else None
        part = _Part(entry, models, base, here, first)
        combiner.check_scopes([part.scope], per_input=False)
        combiner.check_scopes([slot.own for slot in part.slots(str)], per_input=True)
        combiner.check_inputs(models, base, here)
        _check_ranges(entry, models, here, findings)
        first += part.length
        parts.append(part)
    if findings:
        return None
    inputs = [model for part in parts for model in part.models]
    donor = global_base or inputs[0]
    _check_sizes(donor, inputs, findings, path)
    if findings:
        return None
    by_label = {m.label: m for m in _untie(list({m.label: m for m in (donor, *inputs)}.values()))}
    parts = [replace(part, models=[by_label[m.label] for m in part.models]) for part in parts]
    donor = by_label[donor.label]
    tensors = _stack_tensors(parts, donor, combiner, scope, findings)
    combiner.finish()
    try:
        config = restack(_with_layer_types(donor.config), _origins(parts))
    except LayerFieldError as error:
        findings.error(str(error), "Stack models of one family and configuration.", path)
        return None
    config = _finish_config(config, tensors, recipe.out_dtype or recipe.dtype)
    return _assemble("stack", config, tensors, donor, [donor, *inputs])


def _origins(parts: Sequence[_Part]) -> list[tuple[Config, int]]:
    """Return for each output layer the config and layer number of the first source."""
    return [
        (_with_layer_types(part.models[0].config), part.entry.sources[0].layer_range[0] + offset)
        for part in parts
        for offset in range(part.length)
    ]


def _check_sizes(donor: Model, models: Sequence[Model], findings: Findings, path: Path) -> None:
    sizes = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    for model in models:
        if model.config.get("model_type") != donor.config.get("model_type"):
            mine, theirs = donor.config.get("model_type"), model.config.get("model_type")
            what = f"{model.label} is a {theirs} model, {donor.label} a {mine} model"
            findings.error(what, "Stack models of one family.", path)
        for sentence in differences(donor, model, sizes).values():
            findings.error(f"{sentence}; one config holds for all layers", path=path)


def _stack_tensors(
    parts: Sequence[_Part], donor: Model, combiner: Combiner, scope: Scope, findings: Findings
) -> list[PlannedTensor]:
    tensors: list[PlannedTensor | None] = []
    stem = donor.layers.stem

    def outside(part: _Part, before: bool) -> None:
        names = [
            [n for n in m.tensors if m.layers.split(n) is None and is_input(n) is before]
            for m in part.models
        ]
        for name in names[0]:
            if any(name not in theirs for theirs in names[1:]):
                findings.error(f"not all models of a slice have {name}", path=part.path)
                continue
            slots = part.slots(lambda _: name)
            tensors.append(combiner.tensor(name, slots, [part.scope, scope], part.base, 0.0))

    outside(parts[0], before=True)
    for part in parts:
        for offset in range(part.length):
            position = offset / (part.length - 1) if part.length > 1 else 1.0
            rests = []
            for model, source in zip(part.models, part.entry.sources, strict=True):
                index = source.layer_range[0] + offset
                prefix = f"{model.layers.stem}{index}."
                rests.append(
                    [n.removeprefix(prefix) for n in model.tensors if n.startswith(prefix)]
                )
            uneven = sorted(set().union(*map(set, rests)) - set.intersection(*map(set, rests)))
            if uneven:
                what = f"the models of a slice do not all have {listing(uneven)} in each layer"
                findings.error(what, "Merge layers of one kind.", part.path)
            for rest in rests[0]:
                if rest in uneven:
                    continue

                def name_in(
                    i: int, rest: str = rest, part: _Part = part, offset: int = offset
                ) -> str:
                    start = part.entry.sources[i].layer_range[0]
                    return f"{part.models[i].layers.stem}{start + offset}.{rest}"

                name = f"{stem}{part.first + offset}.{rest}"
                slots = part.slots(name_in)
                tensors.append(
                    combiner.tensor(name, slots, [part.scope, scope], part.base, position)
                )
    outside(parts[-1], before=False)
    return [tensor for tensor in tensors if tensor is not None]


_UNIFORM = {"llama", "mistral", "mixtral", "granite", "granitemoe", "olmo2", "phi3"}
"""Families whose layers are all of one kind, so that their config has nothing per layer."""


def _with_layer_types(config: Config) -> Config:
    """Write out `layer_types` where the family derives them from the layer number.

    Once layers move, the derivation would be wrong. transformers knows every family's rule.
    """
    kind = config.get("model_type")
    if kind in _UNIFORM or "layer_types" in config or "text_config" in config:
        return config
    if kind in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe") and not config.get(
        "use_sliding_window"
    ):
        return config
    from transformers import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        return config
    types = getattr(CONFIG_MAPPING[kind].from_dict(dict(config)), "layer_types", None)
    if not types or len(set(types)) < 2:
        return config
    return {**config, "layer_types": list(types)}

"""Owns merges of whole models, tensor by tensor: a recipe becomes a Model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moeforge.configs import Config, n_layers, portable
from moeforge.errors import Path
from moeforge.planners.combine import Combiner, Seed, Slot, missing_tensors
from moeforge.planners.fit import tokens_lost_and_moved, unlike
from moeforge.planners.model import (
    EMBEDDINGS,
    HEAD,
    Findings,
    Model,
    differences,
    listing,
    main_dtype,
)
from moeforge.planners.vocab import Vocabulary, plan_vocabulary
from moeforge.plans import PlannedTensor
from moeforge.recipe import MergeRecipe
from moeforge.recipe.parameters import Scope

Resolve = Callable[[Any, Path], "Model | None"]
"""Turns a model of the recipe into a Model; None where that failed and was reported."""


@dataclass(frozen=True)
class Around:
    """What a recipe around says of a merge or stack that is one module of it.

    Attributes:
        scopes: parameters that hold for all modules.
        vocabulary: how tensors with a vocabulary axis are aligned.
        used: receives the paths of settings that decided a value.
    """

    scopes: tuple[Scope, ...] = ()
    vocabulary: Vocabulary | None = None
    used: set[Path] = field(default_factory=set)


def untie(models: Sequence[Model], notes: Findings, path: Path) -> list[Model]:
    """Give tied models a head of their own where another input has one, and note it."""
    if all(model.tied for model in models) or not any(model.tied for model in models):
        return list(models)
    tied, own = ([m.label for m in models if m.tied is word] for word in (True, False))
    what = f"{listing(own)} with, {listing(tied)} without an output head of its own"
    notes.error(f"{what}: the output has one, and embeddings serve as the missing heads", path=path)
    return [
        replace(
            model,
            tensors={**model.tensors, HEAD: replace(model.tensors[EMBEDDINGS], name=HEAD)},
        )
        if model.tied
        else model
        for model in models
    ]


def finish_config(config: Config, tensors: Sequence[PlannedTensor]) -> Config:
    """Write the dtype, and whether the head is tied, as the tensors have it."""
    config = portable(config, main_dtype(tensors))
    names = {tensor.name for tensor in tensors}
    if (EMBEDDINGS in names and "tie_word_embeddings" in config) or HEAD in names:
        config["tie_word_embeddings"] = HEAD not in names
    return config


_SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def same_shape(donor: Model, other: Model, findings: Findings, path: Path) -> None:
    """Report sizes that the one config of the result would have wrong for `other`.

    Tensors do not tell: twice the heads of half the width have the same shapes.
    """
    if facts := differences(donor, other, _SHAPE):
        findings.error("; ".join(facts.values()), "Use models of one shape.", path)


def note_differences(donor: Model, others: Sequence[Model], notes: Findings, path: Path) -> None:
    """Note facts of `others` that the config of the result will not say."""
    for other in others:
        facts = ("model_type", "rope_theta", "rms_norm_eps", "hidden_act")
        for sentence in differences(donor, other, facts).values():
            notes.error(f"{sentence}; the result is configured as {donor.label}", path=path)


def note_other_tokens(donor: Model, others: Sequence[Model], notes: Findings, path: Path) -> None:
    """Warn of tokens that are lost or have moved, where the recipe does not choose its tokens."""
    for other in others:
        lost, moved = tokens_lost_and_moved(donor, other)
        if lost:
            what = f"{other.label} has {len(lost)} tokens that {donor.label} lacks"
            fix = "The result has the tokens of {}: write tokenizer: {{source: union}} for all."
            notes.warn(f"{what}: {listing(lost, 5)}", fix.format(donor.label), path)
        if moved:
            what = f"{other.label} has {len(moved)} tokens under other ids than {donor.label}"
            fix = "One row would be of different tokens: write tokenizer: {source: base}."
            notes.warn(f"{what}: {listing(moved, 5)}", fix, path)


def plan_merge(
    recipe: MergeRecipe,
    resolve: Resolve,
    path: Path,
    findings: Findings,
    notes: Findings,
    seed: Seed,
    around: Around | None = None,
) -> Model | None:
    """Plan a merge of whole models; None where something was found wrong."""
    around = around or Around()
    before = len(findings)
    entries = [entry.model for entry in recipe.models]
    models = [resolve(entry, (*path, "models", i, "model")) for i, entry in enumerate(entries)]
    owns = [
        Scope(entry.parameters, (*path, "models", i, "parameters"))
        for i, entry in enumerate(recipe.models)
    ]
    base = None
    if recipe.base_model is not None:
        if recipe.base_model in entries:
            base = entries.index(recipe.base_model)
        else:  # mergekit appends it as one more input, for every method
            base = len(models)
            entries.append(recipe.base_model)
            models.append(resolve(recipe.base_model, (*path, "base_model")))
            owns.append(Scope({}, (*path, "base_model", "parameters")))
    for i, entry in enumerate(recipe.models):
        if any(entry.model == other.model for other in recipe.models[:i]):
            what = f"{entry.model} is listed twice"
            findings.error(what, "List it once, with its weights added up.", (*path, "models", i))
    scope = Scope(recipe.parameters, (*path, "parameters"))
    dtype = recipe.out_dtype or recipe.dtype
    combiner = Combiner(recipe.merge_method, dtype, path, findings, notes, seed, used=around.used)
    combiner.check_scopes([scope], per_input=False)
    combiner.check_scopes(owns[: len(recipe.models)], per_input=True)
    combiner.check_inputs(len(models), base, path)
    inputs = [model for model in models if model is not None]
    if len(inputs) < len(models):
        return None
    donor = inputs[base if base is not None else 0]
    _check_fit(donor, inputs, owns, findings, notes, path)
    if len(findings) > before:
        return None
    combiner.vocabulary = around.vocabulary or plan_vocabulary(
        recipe.vocabulary,
        recipe.chat_template,
        list(zip(entries, inputs, strict=True)),
        donor,
        resolve,
        path,
        findings,
        notes,
    )
    if len(findings) > before:
        return None
    if combiner.vocabulary is None:
        note_other_tokens(donor, [model for model in inputs if model is not donor], notes, path)
    label, scopes = f"{recipe.merge_method} merge", [scope, *around.scopes]
    return merged(label, combiner, donor, inputs, owns, scopes, base, findings)


def _check_fit(
    donor: Model,
    inputs: Sequence[Model],
    owns: Sequence[Scope],
    findings: Findings,
    notes: Findings,
    path: Path,
) -> None:
    """Report models that one config cannot hold for."""
    before = len(findings)
    for model, own in zip(inputs, owns, strict=True):
        alike = model.config.get("model_type") == donor.config.get("model_type")
        if not alike and set(model.tensors).isdisjoint(donor.tensors):
            findings.error(*unlike(donor, model, inputs), own.path[:-1])
    if len(findings) > before:
        return
    note_differences(donor, [model for model in inputs if model is not donor], notes, path)
    depths = {model.label: n_layers(model.config) for model in inputs}
    if len(set(depths.values())) > 1:
        said = ", ".join(f"{label} has {depth} layers" for label, depth in depths.items())
        findings.error(said, "Merge models of one depth, or stack them with slices.", path)
    for model, own in zip(inputs, owns, strict=True):
        same_shape(donor, model, findings, own.path[:-1])


def merged(
    label: str,
    combiner: Combiner,
    donor: Model,
    models: Sequence[Model],
    owns: Sequence[Scope],
    scopes: Sequence[Scope],
    base: int | None,
    findings: Findings,
) -> Model:
    """Return the merge of `models`, which fit together, tensor by tensor.

    Args:
        label: how messages call it.
        combiner: merges each place.
        donor: the model that config and tokenizer come from.
        models: the inputs in the order of the recipe.
        owns: parameters of each input alone.
        scopes: parameters that hold for all inputs, most specific first.
        base: index of the base among the inputs.
        findings: gets what is wrong.
    """
    inputs = untie(models, combiner.notes, combiner.path)
    tensors = []
    for name in missing_tensors(inputs, findings, combiner.path):
        slots = [Slot(model, name, own) for model, own in zip(inputs, owns, strict=True)]
        position = inputs[0].position(name)
        tensors.append(combiner.tensor(name, slots, scopes, base, position))
    combiner.finish()
    planned = [tensor for tensor in tensors if tensor is not None]
    vocabulary = combiner.vocabulary
    config = vocabulary.config(donor.config) if vocabulary else donor.config
    change = vocabulary.change if vocabulary else donor.tokenizer
    made = assemble(label, finish_config(config, planned), planned, donor, inputs)
    return replace(made, tokenizer=change)


def assemble(
    label: str,
    config: Config,
    tensors: Sequence[PlannedTensor],
    donor: Model,
    inputs: Sequence[Model],
) -> Model:
    """Return planned `tensors` as a model, with what its inputs leave out."""
    return Model(
        label,
        config,
        {tensor.name: tensor for tensor in tensors},
        donor.donor,
        {key: source for model in inputs for key, source in model.sources.items()},
        {read: reason for model in inputs for read, reason in model.left_out.items()},
    )

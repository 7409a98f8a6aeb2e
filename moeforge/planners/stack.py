"""Owns stacks of layer ranges ("frankenmerges"): a recipe becomes a Model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moeforge.errors import Path
from moeforge.planners.combine import Combiner, Seed, Slot
from moeforge.planners.fit import unlike
from moeforge.planners.layer_keys import LayerFieldError, Origin
from moeforge.planners.layer_proof import proven
from moeforge.planners.merge import (
    Around,
    Resolve,
    assemble,
    finish_config,
    note_differences,
    note_other_tokens,
    same_shape,
    untie,
)
from moeforge.planners.model import Findings, Model, differences, listing, natural, towers, unused
from moeforge.planners.prediction import without_prediction
from moeforge.planners.vocab import plan_vocabulary
from moeforge.plans import PlannedTensor
from moeforge.recipe import Slice, StackRecipe
from moeforge.recipe.parameters import Scope


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

    @property
    def owns(self) -> list[Scope]:
        return [
            Scope(source.parameters, (*self.path, "sources", i, "parameters"))
            for i, source in enumerate(self.entry.sources)
        ]

    def slots(self, names: Sequence[str]) -> list[Slot]:
        return list(map(Slot, self.models, names, self.owns))

    @property
    def scope(self) -> Scope:
        return Scope(self.entry.parameters, (*self.path, "parameters"))


def _check_ranges(
    entry: Slice, models: Sequence[Model | None], path: Path, findings: Findings
) -> None:
    lengths, before = set(), len(findings)
    for i, (source, model) in enumerate(zip(entry.sources, models, strict=True)):
        start, end = source.layer_range
        here = (*path, "sources", i, "layer_range")
        lengths.add(end - start)
        if model is not None and not model.layers.stem:
            what = f"{model.label}: no numbered layers found that match its config"
            fix = "Only models made of layers can be stacked; of several modules, each by itself: "
            findings.error(what, f"{fix}modules: {{NAME: {{slices: …}}}}.", here)
        elif model is not None and (beside := _beside(model)):
            what = f"{model.label}: {beside} is numbered like its layers, and lies outside them"
            findings.error(
                what, "Its layers cannot be stacked: a part of each would not move.", here
            )
        elif model is not None and (start < 0 or max(start, end) > model.layers.count):
            count = model.layers.count
            what = f"layer_range [{start}, {end}], but {model.label} has {count} layers"
            findings.error(what, f"Valid: 0 to {count}, the end is exclusive.", here)
        elif end <= start:
            what = f"layer_range [{start}, {end}] is empty"
            findings.error(what, f"For layer {start} alone write [{start}, {start + 1}].", here)
    if len(lengths) > 1 and len(findings) == before:
        spans = ", ".join(str(list(source.layer_range)) for source in entry.sources)
        findings.error(f"the layer ranges of one slice differ in length: {spans}", path=path)


def _without_prediction(resolve: Resolve) -> Resolve:
    """Return `resolve` for models without layers that predict further tokens, each made once."""
    made: dict[str, Model] = {}

    def plain(entry: Any, path: Path) -> Model | None:
        model = resolve(entry, path)
        return None if model is None else made.setdefault(model.label, without_prediction(model))

    return plain


def _beside(model: Model) -> str | None:
    """Return the stem of numbered tensors outside the layers that there are as many of, or None."""
    most = model.layers.count + 1
    numbered = (name for name in model.tensors if name.rpartition(".")[2].isdigit())
    stems = towers(f"{name}.all" for name in numbered).items()
    near = [stem for stem, count in stems if most - 2 <= count <= most and count > 1]
    return next((stem for stem in near if stem != model.layers.stem), None)


def plan_stack(
    recipe: StackRecipe,
    resolve: Resolve,
    path: Path,
    findings: Findings,
    notes: Findings,
    seed: Seed,
    around: Around | None = None,
) -> Model | None:
    """Plan a stack of layer ranges; None where something was found wrong.

    Embeddings come from the sources of the first slice, final norm and head from the last slice's.
    """
    around = around or Around()
    resolve = _without_prediction(resolve)
    scope = Scope(recipe.parameters, (*path, "parameters"))
    dtype = recipe.out_dtype or recipe.dtype
    combiner = Combiner(recipe.merge_method, dtype, path, findings, notes, seed, used=around.used)
    combiner.check_scopes([scope], per_input=False)
    global_base = (
        resolve(recipe.base_model, (*path, "base_model")) if recipe.base_model is not None else None
    )
    before = len(findings)
    parts: list[_Part] = []
    first = 0
    for i, entry in enumerate(recipe.slices):
        here = (*path, "slices", i)
        found = [
            resolve(source.model, (*here, "sources", j, "model"))
            for j, source in enumerate(entry.sources)
        ]
        models = [model for model in found if model is not None]
        named = [source.model for source in entry.sources]
        wanted = entry.base_model if entry.base_model is not None else recipe.base_model
        base = named.index(wanted) if wanted is not None and wanted in named else None
        part = _Part(entry, models, base, here, first)
        combiner.check_scopes([part.scope], per_input=False)
        combiner.check_scopes(part.owns, per_input=True)
        combiner.check_inputs(len(found), base, here)
        _check_ranges(entry, found, here, findings)
        first += part.length
        parts.append(part)
    if len(findings) > before or any(len(p.models) < len(p.entry.sources) for p in parts):
        return None
    inputs = [model for part in parts for model in part.models]
    donor = global_base or inputs[0]
    combiner.vocabulary = around.vocabulary or plan_vocabulary(
        recipe.vocabulary,
        recipe.chat_template,
        _entries(recipe, parts, global_base),
        donor,
        resolve,
        path,
        findings,
        notes,
    )
    _check_sizes(donor, parts, findings, vocabulary=combiner.vocabulary is not None)
    if len(findings) > before:
        return None
    others = {model.label: model for model in inputs if model is not donor}
    note_differences(donor, list(others.values()), notes, path)
    if combiner.vocabulary is None:
        note_other_tokens(donor, list(others.values()), notes, path)
    by_label = {
        m.label: m
        for m in untie(list({m.label: m for m in (donor, *inputs)}.values()), notes, path)
    }
    parts = [replace(part, models=[by_label[m.label] for m in part.models]) for part in parts]
    donor = by_label[donor.label]
    stacker = _Stacker(combiner, [scope, *around.scopes], findings)
    tensors = list(stacker.tensors(parts, donor.layers.stem))
    combiner.finish()
    if len(findings) > before:
        return None
    vocabulary = combiner.vocabulary
    config = vocabulary.config(donor.config) if vocabulary else donor.config
    split = (donor.layers.split(tensor.name) for tensor in tensors)
    try:
        config, said = proven(config, _origins(parts), {found[1] for found in split if found})
    except LayerFieldError as error:
        findings.error(str(error), "Choose other layers, or models of one configuration.", path)
        return None
    for sentence in said:
        notes.error(sentence, path=path)
    config = finish_config(config, tensors)
    stacked = assemble("stack", config, tensors, donor, [donor, *inputs])
    in_no_slice = {read: "in no slice" for _, read in unused(by_label.values(), tensors)}
    change = vocabulary.change if vocabulary else donor.tokenizer
    return replace(stacked, tokenizer=change, left_out={**in_no_slice, **stacked.left_out})


def _entries(
    recipe: StackRecipe, parts: Sequence[_Part], base: Model | None
) -> list[tuple[Any, Model]]:
    """Return every input of the stack once, as the recipe names it and as the model it is."""
    entries = [] if base is None else [(recipe.base_model, base)]
    for part in parts:
        for source, model in zip(part.entry.sources, part.models, strict=True):
            if not any(source.model == entry for entry, _ in entries):
                entries.append((source.model, model))
    return entries


def _origins(parts: Sequence[_Part]) -> list[Origin]:
    """Return for each output layer the layer of the first source."""
    return [
        Origin(model.label, model.config, part.entry.sources[0].layer_range[0] + offset)
        for part in parts
        for model in part.models[:1]
        for offset in range(part.length)
    ]


def _check_sizes(
    donor: Model, parts: Sequence[_Part], findings: Findings, *, vocabulary: bool
) -> None:
    """Report models that one config cannot hold for, each once."""
    seen = {donor.label}
    for number, part in enumerate(parts):
        for i, model in enumerate(part.models):
            here = (*part.path, "sources", i)
            if number in (0, len(parts) - 1) and not vocabulary:
                for sentence in differences(donor, model, ("vocab_size",)).values():
                    fix = "The first slice brings the embeddings, the last the head: use one size."
                    findings.error(sentence, fix, here)
            if model.label in seen:
                continue
            seen.add(model.label)
            mine, theirs = donor.config.get("model_type"), model.config.get("model_type")
            if mine == theirs:
                same_shape(donor, model, findings, here)
                continue
            others = [each for part in parts for each in part.models]
            findings.error(*unlike(donor, model, others), here)


class _Stacker:
    """Makes the tensors of a stack whose slices are known to fit."""

    def __init__(self, combiner: Combiner, scopes: Sequence[Scope], findings: Findings) -> None:
        self._combiner = combiner
        self._scopes = scopes
        self._findings = findings
        self._layers: dict[int, dict[str, list[str]]] = {}

    def tensors(self, parts: Sequence[_Part], stem: str) -> Iterator[PlannedTensor]:
        """Yield embeddings, layers in their new order, then final norm and head."""
        yield from self._outside(parts[0], before=True)
        for part in parts:
            for offset in range(part.length):
                yield from self._layer(part, offset, stem)
        yield from self._outside(parts[-1], before=False)

    def _outside(self, part: _Part, *, before: bool) -> Iterator[PlannedTensor]:
        names = [
            [n for n in m.tensors if m.layers.split(n) is None and m.leads(n) is before]
            for m in part.models
        ]
        for name in self._shared(names, part):
            yield from self._tensor(name, [name] * len(part.models), part, 0.0)

    def _layer(self, part: _Part, offset: int, stem: str) -> Iterator[PlannedTensor]:
        position = offset / (part.length - 1) if part.length > 1 else 1.0
        prefixes = [
            f"{model.layers.stem}{source.layer_range[0] + offset}."
            for model, source in zip(part.models, part.entry.sources, strict=True)
        ]
        names = [
            self._layers_of(model).get(prefix, [])
            for model, prefix in zip(part.models, prefixes, strict=True)
        ]
        for rest in self._shared(names, part):
            name = f"{stem}{part.first + offset}.{rest}"
            yield from self._tensor(name, [prefix + rest for prefix in prefixes], part, position)

    def _layers_of(self, model: Model) -> dict[str, list[str]]:
        """Return the names of the tensors of each layer, without what stands before in all."""
        if id(model) not in self._layers:
            found = self._layers[id(model)] = dict[str, list[str]]()
            for name in model.tensors:
                if split := model.layers.split(name):
                    found.setdefault(name.removesuffix(split[1]), []).append(split[1])
        return self._layers[id(model)]

    def _shared(self, names: Sequence[list[str]], part: _Part) -> list[str]:
        everywhere = set(names[0]).intersection(*names)
        if uneven := sorted(set().union(*names) - everywhere, key=natural):
            what = f"the models of a slice do not all have {listing(uneven)}"
            self._findings.error(what, "Merge layers of one kind.", part.path)
        return [name for name in names[0] if name in everywhere]

    def _tensor(
        self, name: str, inputs: Sequence[str], part: _Part, position: float
    ) -> Iterator[PlannedTensor]:
        scopes = [part.scope, *self._scopes]
        tensor = self._combiner.tensor(name, part.slots(inputs), scopes, part.base, position)
        if tensor is not None:
            yield tensor

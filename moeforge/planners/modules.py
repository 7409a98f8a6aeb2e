"""Owns models of several modules: which tensors each has, and recipes that say how each is made."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moeforge.configs import Config
from moeforge.errors import Path, nearest
from moeforge.planners.combine import Combiner, Seed
from moeforge.planners.merge import Around, Resolve, assemble, finish_config, plan_merge
from moeforge.planners.model import Findings, Model, unused
from moeforge.planners.stack import plan_stack
from moeforge.planners.vocab import Vocabulary, plan_vocabulary
from moeforge.plans import PlannedTensor, Read
from moeforge.recipe import MergeRecipe, Module, ModulesRecipe, StackRecipe
from moeforge.recipe.parameters import Scope
from moeforge.tensors import BY_NAME, TensorSpec

_PROJECTOR = re.compile(
    r"(^|\.)(multi_modal_projector|connector|visual\.(merger|deepstack_merger_list))\."
)
_VISION = re.compile(r"(^|\.)(vision_tower|vision_model|visual)\.")
_CODER = re.compile(r"^(?:model\.)?(encoder|decoder)\.")


@dataclass(frozen=True)
class _Kind:
    """A module, and where its config lies in the model's.

    Attributes:
        name: as recipes name it.
        nested: keys that may hold its config; empty for the model's own.
        depth: keys of the model's config that may hold its number of layers.
    """

    name: str
    nested: tuple[str, ...] = ()
    depth: tuple[str, ...] = ()


_KINDS = {
    kind.name: kind
    for kind in (
        _Kind("default"),
        _Kind("text_decoder", ("text_config", "llm_config")),
        _Kind("vision_tower", ("vision_config",)),
        _Kind("vision_model", ("vision_config",)),
        _Kind("multi_modal_projector"),
        _Kind("encoder", depth=("encoder_layers", "num_layers")),
        _Kind("decoder", depth=("decoder_layers", "num_decoder_layers")),
        _Kind("shared"),
    )
}


_OWNERS = ("default", "text_decoder")
"""Modules that the model's config is about where it has none for them; Qwen2-VL's is so."""


def module_of(model: Model, name: str) -> str:
    """Return the module that tensor `name` of `model` belongs to, as mergekit names them.

    A model with a vision tower has text_decoder, vision_tower (vision_model in Llama 4) and
    multi_modal_projector; one with encoder and decoder has these and shared; any other default.
    """
    if _PROJECTOR.search(name):
        return "multi_modal_projector"
    if _VISION.search(name):
        return "vision_model" if model.config.get("model_type") == "llama4" else "vision_tower"
    if any(_VISION.search(other) for other in model.tensors):
        return "text_decoder"
    coders = {match[1] for other in model.tensors if (match := _CODER.match(other))}
    if len(coders) < 2:
        return "default"
    match = _CODER.match(name)
    return match[1] if match else "shared"


def _key(kind: _Kind, config: Config) -> tuple[str | None, str | None]:
    """Return the key of the module's own config, and the one of its number of layers."""
    nested = next((key for key in kind.nested if isinstance(config.get(key), dict)), None)
    return nested, next((key for key in kind.depth if key in config), None)


def view(model: Model, name: str) -> Model:
    """Return module `name` of `model` as a model."""
    nested, depth = _key(_KINDS[name], model.config)
    config: Config = model.config[nested] if nested else model.config
    if depth:
        config = {**config, "num_hidden_layers": config[depth]}
    if name == "default":
        return model
    tensors = {n: t for n, t in model.tensors.items() if module_of(model, n) == name}
    return replace(model, config=config, tensors=tensors, left_out={})


def _back(config: Config, name: str, made: Config) -> Config:
    """Return `config` of a whole model with what module `name` of it has become."""
    nested, depth = _key(_KINDS[name], config)
    if nested:
        return {**config, nested: made}
    if depth:
        return {**config, depth: made["num_hidden_layers"]}
    return made if name in _OWNERS else config


def _entries(recipe: ModulesRecipe) -> Iterator[tuple[Any, Path]]:
    """Yield every model that the recipe names, with its place."""
    if recipe.base_model is not None:
        yield recipe.base_model, ("base_model",)
    for name, module in recipe.modules.items():
        for i, entry in enumerate(module.models):
            yield entry.model, ("modules", name, "models", i, "model")
        for i, part in enumerate(module.slices):
            for j, source in enumerate(part.sources):
                yield source.model, ("modules", name, "slices", i, "sources", j, "model")


def plan_modules(
    recipe: ModulesRecipe,
    resolve: Resolve,
    path: Path,
    findings: Findings,
    notes: Findings,
    seed: Seed,
) -> Model | None:
    """Plan a merge module by module; what the recipe does not name comes from its base."""
    before = len(findings)
    inputs: list[tuple[Any, Model]] = []
    complete = True
    for entry, here in _entries(recipe):
        if any(entry == other for other, _ in inputs):
            continue
        model = resolve(entry, (*path, *here))
        complete = complete and model is not None
        if model is not None:
            inputs.append((entry, model))
    if not complete:
        return None
    donor = inputs[0][1]
    known = sorted({module_of(donor, name) for name in donor.tensors})
    for name in recipe.modules:
        if name not in known:
            what = f'{donor.label} has no module "{name}"{nearest(name, known)}'
            findings.error(what, f"It has {', '.join(known)}.", (*path, "modules", name))
    _check_deepstack(recipe, donor, path, findings)
    if len(findings) > before:
        return None
    vocabulary = plan_vocabulary(
        recipe.vocabulary, recipe.chat_template, inputs, donor, resolve, path, findings, notes
    )
    around = Around((Scope(recipe.parameters, (*path, "parameters")),), vocabulary)
    whole = Combiner(recipe.merge_method, None, path, findings, notes, used=around.used)
    whole.check_scopes(around.scopes, per_input=False)
    made: dict[str, Model] = {}
    for name, module in recipe.modules.items():

        def resolve_view(entry: Any, here: Path, name: str = name) -> Model | None:
            return next((view(model, name) for other, model in inputs if other == entry), None)

        part = _plan_module(
            recipe, module, resolve_view, (*path, "modules", name), findings, notes, seed, around
        )
        if part is not None:
            made[name] = part
    if len(findings) > before or len(made) < len(recipe.modules):
        return None
    for name in known:
        if name not in made:
            what = f"module {name} is not in the recipe: it comes from {donor.label}"
            notes.error(what, path=path)
    whole.finish()
    return _together(recipe, donor, [model for _, model in inputs], known, made, vocabulary)


def _check_deepstack(recipe: ModulesRecipe, donor: Model, path: Path, findings: Findings) -> None:
    """Report stacks that move text layers to which the model adds features of images by number."""
    vision, text = donor.config.get("vision_config"), recipe.modules.get("text_decoder")
    taps = vision.get("deepstack_visual_indexes") if isinstance(vision, dict) else None
    if not taps or text is None or not text.slices:
        return
    ranges = [part.sources[0].layer_range for part in text.slices]
    numbers = [number for start, end in ranges for number in range(start, end)]
    for layer in range(len(taps)):
        if numbers[layer : layer + 1] != [layer]:
            what = f"{donor.label} adds features of images to its first {len(taps)} text layers"
            fix = f"Begin the stack with layers 0 to {len(taps)}: layer {layer} would be another."
            findings.error(what, fix, (*path, "modules", "text_decoder", "slices"))
            return


def _plan_module(
    recipe: ModulesRecipe,
    module: Module,
    resolve: Resolve,
    path: Path,
    findings: Findings,
    notes: Findings,
    seed: Seed,
    around: Around,
) -> Model | None:
    shared: dict[str, Any] = {
        "merge_method": recipe.merge_method,
        "base_model": recipe.base_model,
        "parameters": module.parameters,
        "dtype": recipe.dtype,
        "out_dtype": recipe.out_dtype,
    }
    if module.slices:
        stack = StackRecipe(slices=module.slices, **shared)
        return plan_stack(stack, resolve, path, findings, notes, seed, around)
    merge = MergeRecipe(models=module.models, **shared)
    return plan_merge(merge, resolve, path, findings, notes, seed, around)


def _together(
    recipe: ModulesRecipe,
    donor: Model,
    inputs: Sequence[Model],
    known: Sequence[str],
    made: Mapping[str, Model],
    vocabulary: Vocabulary | None,
) -> Model:
    """Return the whole model: modules as they were made, and the donor's where they were not."""
    config = vocabulary.config(donor.config) if vocabulary else donor.config
    tensors: list[PlannedTensor] = []
    left_out: dict[Read, str] = {}
    dtype = recipe.out_dtype or recipe.dtype
    for name in known:
        if name in made:
            config = _back(config, name, made[name].config)
            tensors += made[name].tensors.values()
            left_out.update(made[name].left_out)
            continue
        part = view(donor, name)
        for tensor in part.tensors.values():
            if vocabulary:
                (tensor,) = vocabulary.align([(part, tensor.name)])
            kept = tensor.spec.dtype
            wanted = BY_NAME[dtype] if dtype and kept.mergeable else kept
            tensors.append(replace(tensor, spec=TensorSpec(wanted, tensor.spec.shape)))
    whole = assemble("merge of modules", finish_config(config, tensors), tensors, donor, inputs)
    change = vocabulary.change if vocabulary else donor.tokenizer
    others = ", ".join(module for module in known if module not in made)
    elsewhere = {read: f"{others} comes from {donor.label}" for _, read in unused(inputs, tensors)}
    left_out = {**elsewhere, **left_out, **whole.left_out}
    return replace(whole, tokenizer=change, left_out=left_out)

"""Owns what a card can tell of a plan: facts from the plan, its recipe and the parents' cards."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moeforge import gates, methods
from moeforge.errors import SourceError
from moeforge.output.cards.facts import Chat, Engine, Expert, Facts, Method, Mixture, Parent
from moeforge.output.cards.metadata import pipeline
from moeforge.output.cards.strangers import read_card
from moeforge.output.folder import has_tokenizer
from moeforge.output.lock import commit_of
from moeforge.plans import ROUTERS, Merge, Plan, Read, walk
from moeforge.recipe import AVERAGE, Combination, ExtractRecipe, MoeRecipe, Recipe, RegroupRecipe
from moeforge.recipe import Expert as Wanted
from moeforge.sources import Source
from moeforge.sources.folder import module_folders
from moeforge.version import __version__
from moeforge.vocabulary.chat import read_template

_SHOWN = 3
"""Prompts of an expert that are told of."""
_LISTED = 8
"""Numbers of experts, or runs of them, that are told of one by one."""
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_TEMPLATES = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")


def gather(
    plan: Plan,
    recipe: Recipe,
    name: str,
    folder: Path,
    *,
    engines: Sequence[Engine] = (),
    warnings: Sequence[str] = (),
) -> Facts:
    """Return what is to be told of a model before anything was measured.

    Args:
        plan: how it was made.
        recipe: what the plan was made from.
        name: of the model.
        folder: where it lies, with all files but the card.
        engines: what is known of other software.
        warnings: what is to be warned of.
    """
    sentences = bool(module_folders(folder))
    task = pipeline(plan.config, sentences=sentences)
    return Facts(
        version=__version__,
        name=name,
        kind=plan.kind,
        architecture=str((plan.config.get("architectures") or ["model"])[0]),
        model_type=str(plan.config.get("model_type", "")),
        pipeline=task,
        sentences=sentences,
        tokenizer=has_tokenizer(folder),
        dtype=str(plan.config.get("dtype", "")),
        parameters=plan.parameters,
        active=plan.active_parameters,
        nbytes=plan.nbytes,
        code=tuple(plan.code),
        parents=tuple(_parents(plan, recipe)),
        methods=tuple(_methods(plan)),
        mixture=_mixture(plan, recipe),
        taken=_taken(recipe),
        engines=tuple(engines),
        chat=_chat(plan, folder) if task == "text-generation" else None,
        warnings=tuple(warnings),
    )


def _inputs(plan: Plan) -> dict[str, Source]:
    """Return all checkpoints and adapters that went in, by the name that the plan has for them."""
    found = {key: source for key, source in plan.sources.items() if key != ROUTERS}
    if plan.donor not in found.values():
        found[plan.donor.key] = plan.donor
    return found


def _hub_id(source: Source) -> str:
    """Return the repository that a source was fetched from; "" for others."""
    cached = re.search(r"/models--([^/]+)/snapshots/[0-9a-f]{40}(/|$)", f"{source.folder}")
    return getattr(source, "repo_id", "") or (cached[1].replace("--", "/", 1) if cached else "")


def _parents(plan: Plan, recipe: Recipe) -> Iterator[Parent]:
    layers = _layers(plan) if plan.kind == "stack" else {}
    for key, source in _inputs(plan).items():
        repo = _hub_id(source)
        said = read_card(source.folder, repo)
        yield Parent(
            key=source.key,
            repo=repo,
            commit=(commit_of(source) or "") if repo else "",
            roles=tuple(_roles(plan, recipe, key, source, layers.get(key, []))),
            license=said.license,
            license_name=said.license_name,
            license_link=said.license_link,
            languages=said.languages,
            datasets=said.datasets,
        )


def _roles(
    plan: Plan, recipe: Recipe, key: str, source: Source, layers: list[str]
) -> Iterator[str]:
    experts = plan.experts
    if key == (experts.base if experts else _base(recipe)):
        yield "base"
    if key in map(str, _mixtures(recipe)):
        yield f"mixture: {_taken(recipe)}"
    for word, labels in (
        ("expert", experts.labels if experts else ()),
        ("shared expert", experts.shared if experts else ()),
    ):
        # An expert with an adapter is named "model+adapter".
        numbers = [n for n, label in enumerate(labels) if key in (label, *label.split("+"))]
        if numbers:
            yield f"{word} {said}" if (said := _numbers(numbers)) else f"{len(numbers)} {word}s"
    if layers:
        yield f"layers {', '.join(layers)}"
    if source is plan.donor:
        yield "config and tokenizer"
    if "peft_type" in source.config:
        yield "LoRA adapter"


def _base(recipe: Recipe) -> str:
    """Return what a merge or a stack calls its base; "" for none."""
    return str(recipe.base_model or "") if isinstance(recipe, Combination) else ""


def _mixtures(recipe: Recipe) -> Iterator[object]:
    """Yield the mixture that is taken apart, if any."""
    if isinstance(recipe, ExtractRecipe):
        yield recipe.extract.model
    if isinstance(recipe, RegroupRecipe):
        yield recipe.regroup.model


def _taken(recipe: Recipe) -> str:
    """Return in words which experts of a mixture a recipe takes."""
    if isinstance(recipe, ExtractRecipe):
        number = recipe.extract.expert
        return "the average of its experts" if number == AVERAGE else f"expert {number}"
    if not isinstance(recipe, RegroupRecipe):
        return ""
    kept = recipe.regroup.keep
    numbers = [number for number in kept if isinstance(number, int)]
    if said := _numbers(numbers):
        return f"experts {said}"
    count = f"{len(numbers)} experts" if numbers else f"{len(kept[0])} experts of each layer"
    return f"{count}, which the recipe lists"


def _numbers(numbers: Sequence[int]) -> str:
    """Return numbers in their order, many of them as runs; empty where that is no shorter."""
    if len(numbers) <= _LISTED:
        return ", ".join(map(str, numbers))
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(map(_span, runs)) if len(runs) <= _LISTED else ""


def _layers(plan: Plan) -> dict[str, list[str]]:
    """Return for each source the runs of its layers in the order in which they are stacked."""
    found: dict[str, dict[int, int]] = defaultdict(dict)
    for tensor in plan.tensors:
        if not (place := _LAYER.search(tensor.name)):
            continue
        for part in walk(tensor.expr):
            if isinstance(part, Read) and (layer := _LAYER.search(part.name)):
                found[part.source][int(place[1])] = int(layer[1])
    return {key: list(_runs(places)) for key, places in found.items()}


def _runs(places: dict[int, int]) -> Iterator[str]:
    """Yield runs of layers that follow each other both where they were and where they are."""
    run: list[int] = []
    for place in sorted(places):
        if run and (places[place] != run[-1] + 1 or places.get(place - 1) != run[-1]):
            yield _span(run)
            run = []
        run.append(places[place])
    if run:
        yield _span(run)


def _span(run: list[int]) -> str:
    return f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0])


def _methods(plan: Plan) -> Iterator[Method]:
    values: dict[str, dict[str, dict[Any, None]]] = defaultdict(lambda: defaultdict(dict))
    for tensor in plan.tensors:
        for part in walk(tensor.expr):
            if isinstance(part, Merge):
                for name, value in part.params:
                    values[part.method][name][value] = None
                values[part.method]  # one without parameters counts too
    for word in sorted(values.keys() - {"passthrough"}):
        method = methods.load(word)
        unused = {name for name, param in method.params.items() if param.unused}
        given = [
            f"{name}: {_value(list(found))}"
            for name, found in values[word].items()
            if name not in unused and set(found) != {None}
        ]
        yield Method(word, method.title, method.paper or "", tuple(given))


def _value(found: list[Any]) -> str:
    """Return the value of a parameter over all tensors, in words."""
    flat = [v for value in found for v in (value if isinstance(value, tuple) else (value,))]
    flat = [value for value in flat if value is not None]
    if len(found) == 1:
        return " / ".join(map(_word, dict.fromkeys(flat) if len(set(flat)) == 1 else flat))
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in flat):
        return f"{_word(min(flat))} to {_word(max(flat))}"
    return "by tensor"


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _mixture(plan: Plan, recipe: Recipe) -> Mixture | None:
    if plan.experts is None:
        return None
    routed = recipe.experts if isinstance(recipe, MoeRecipe) else ()
    shared = recipe.shared_experts if isinstance(recipe, MoeRecipe) else ()
    experts = [
        *map(_expert, plan.experts.labels, routed),
        *(_expert(*pair, shared=True) for pair in zip(plan.experts.shared, shared, strict=False)),
    ]
    mode = plan.experts.gate_mode
    return Mixture(plan.experts.per_token, mode, gates.load(mode).title, tuple(experts))


def _expert(label: str, wanted: Wanted, *, shared: bool = False) -> Expert:
    """Return what is told of an expert: of prompts only those that the recipe shows anyway."""
    prompts = tuple(map(str, wanted.positive_prompts[:_SHOWN]))
    return Expert(label, prompts, wanted.prompts_file or "", shared)


def _chat(plan: Plan, folder: Path) -> Chat | None:
    template = read_template(folder)
    if template is None:
        return None
    file = next(name for name in _TEMPLATES if (folder / name).is_file())
    alike: list[str] = []
    others: list[str] = []
    for source in _inputs(plan).values():
        try:
            found = read_template(source.folder)
        except SourceError:  # a damaged one is none that the model was trained with
            found = None
        if found is not None:
            (alike if found == template else others).append(source.key)
    return Chat(file, tuple(alike), tuple(others))

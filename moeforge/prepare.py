"""Owns what is done before a build and without weights: recipe, plan, prompts, every mistake."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeforge import gates
from moeforge import recipe as recipes
from moeforge.errors import Finding, MoeforgeError, PlanError
from moeforge.output.fingerprint import fingerprint
from moeforge.output.folder import differing_modules, has_chat_template, has_tokenizer
from moeforge.output.layout import Shard
from moeforge.planners import Planner
from moeforge.planners.align import rows
from moeforge.planners.vocab import tokens_of
from moeforge.plans import Plan
from moeforge.recipe import (
    Adapter,
    LoadedRecipe,
    MoeRecipe,
    Prompt,
    Recipe,
    Reference,
    tuning,
)
from moeforge.recipe.placeholders import is_placeholder
from moeforge.recipe.prompts import load as load_prompts
from moeforge.sources import Source, open_source
from moeforge.sources.adapter import open_adapter

ExpertPrompt = tuple[int, bool, Prompt]
"""Index of the expert or -1, whether the prompt is a negative one, and the prompt."""


@dataclass(frozen=True)
class Padding:
    """A model whose embeddings have another number of rows than its tokenizer has tokens.

    Attributes:
        model: whose.
        rows: rows of its embeddings.
        tokens: entries of its tokenizer, gaps between ids included.
    """

    model: str
    rows: int
    tokens: int


@dataclass(frozen=True)
class Prepared:
    """A recipe that can be built.

    Attributes:
        loaded: the recipe.
        planner: the planner that made the plan; it knows the recipe's models.
        plan: what will be made.
        prompts: what the gate mode reads; empty where it reads none.
        remarks: what is worth knowing of prompts and tokenizer.
        padding: embeddings and tokenizer of different size, where the output gets both.
    """

    loaded: LoadedRecipe
    planner: Planner
    plan: Plan
    prompts: Sequence[ExpertPrompt]
    remarks: tuple[Finding, ...] = ()
    padding: Padding | None = None

    def notes(self) -> tuple[Finding, ...]:
        """Return what is worth knowing before the build."""
        notes = [*self.loaded.place(self.plan.notes), *self.remarks]
        if not has_tokenizer(self.plan.donor.folder):
            notes.append(Finding(f"{self.plan.donor.key} has no tokenizer: the output has none"))
        return tuple(notes)

    def fingerprint(self, shards: Sequence[Shard], device: str) -> str:
        """Return what tells whether files of an earlier run are those that this build would make.

        Args:
            shards: how the output is divided into files.
            device: torch device of the arithmetic.
        """
        more = list[str]()
        if self.plan.experts:
            later = {"evaluate": None, "tune": None}  # what is done when the weights are there
            more = [repr(self.loaded.recipe.model_copy(update=later)), repr(self.prompts)]
        return fingerprint(self.plan, shards, device.split(":")[0], more)


def _read_prompts(
    loaded: LoadedRecipe, recipe: Recipe, findings: list[Finding]
) -> list[ExpertPrompt]:
    """Return the prompts that the recipe's gate mode reads, reporting what is wrong with them."""
    if not isinstance(recipe, MoeRecipe):
        return []
    reads = gates.load(recipe.gate_mode).needs_prompts
    needed = reads and recipe.gate_parameters.labels == "owner"
    prompts: list[ExpertPrompt] = []
    seen: dict[frozenset[Prompt], int] = {}
    for i, (path, expert) in enumerate(recipe.numbered):
        try:
            positive = loaded.expert_prompts(expert)
        except ValueError as error:
            findings.append(Finding(str(error), path=(*path, "prompts_file")))
            continue
        if needed and not positive:
            what = f"gate mode {recipe.gate_mode} needs prompts for every expert, this one has none"
            fix = "Add positive_prompts or prompts_file, or choose gate_mode: random to train it."
            findings.append(Finding(what, fix, path))
        elif reads and positive and frozenset(positive) in seen:
            word, number = recipe.numbered[seen[frozenset(positive)]][0]
            what = f"{word}[{number}] has the same prompts: no router can tell them apart"
            findings.append(Finding(what, "Give each expert prompts of its own.", path))
        seen.setdefault(frozenset(positive), i)
        prompts += [(i, False, prompt) for prompt in positive]
        prompts += [(i, True, Prompt(text=text)) for text in expert.negative_prompts]
    if recipe.gate_parameters.data is not None:
        try:
            texts = load_prompts(loaded.find(recipe.gate_parameters.data))
        except ValueError as error:
            findings.append(Finding(str(error), path=("gate_parameters", "data")))
            texts = ()
        prompts += [(-1, False, prompt) for prompt in texts]
    return prompts if reads else []


def _check_labels(planner: Planner, recipe: Recipe, findings: list[Finding]) -> None:
    """Report experts whose loss on a text says nothing of the mixture's tokens."""
    if not isinstance(recipe, MoeRecipe) or recipe.gate_parameters.labels != "loss":
        return
    base = planner.model(recipe.base_model, ("base_model",))
    assert base is not None, "it was planned before"
    for i, expert in enumerate(recipe.experts):
        path = ("experts", i, "source_model")
        if isinstance(expert.source_model, tuple):
            what = "labels: loss runs every expert as a whole model; this one is made of ranges"
            findings.append(Finding(what, "Give it prompts, and write labels: owner.", path))
            continue
        model = planner.model(expert.source_model, path)
        assert model is not None, "it was planned before"
        try:
            same = tokens_of(model).ids == base.ids
        except MoeforgeError as error:
            findings += [replace(finding, path=path) for finding in error.findings]
            continue
        if not same:
            what = f"labels: loss compares losses per token; {model.label} has another tokenizer"
            findings.append(Finding(what, "Give experts prompts, and write labels: owner.", path))


def _check_tokenizer(
    plan: Plan, recipe: Recipe, prompts: Sequence[ExpertPrompt], findings: list[Finding]
) -> None:
    donor = plan.donor
    if has_tokenizer(donor.folder):
        if any(p.messages for _, _, p in prompts) and not has_chat_template(donor.folder):
            what = f"a prompt is a chat (messages), but {donor.key} has no chat template"
            fix = "Give plain texts, or a base with a chat template."
            findings.append(Finding(what, fix, ("base_model",)))
        return
    if prompts:
        what = f"the gate mode reads prompts, but {donor.key} has no tokenizer"
        fix = "Add its tokenizer files, or choose gate_mode: random."
        findings.append(Finding(what, fix, ("base_model",)))
    if recipe.evaluate:
        what = f"evaluate needs a tokenizer, and {donor.key} has none"
        findings.append(Finding(what, "Add its tokenizer files, or drop evaluate.", ("evaluate",)))


_ALIKE = 0.8
"""Experts whose prompts share this part of their words are hardly told apart."""


def _alike(loaded: LoadedRecipe, prompts: Sequence[ExpertPrompt]) -> list[Finding]:
    """Warn of experts whose prompts are nearly those of another one.

    Two are compared by the part of all their different words that both have (Jaccard's index).
    """
    recipe = loaded.recipe
    if not isinstance(recipe, MoeRecipe) or recipe.gate_parameters.labels != "owner":
        return []
    words: dict[int, set[str]] = {}
    for expert, negative, prompt in prompts:
        if expert >= 0 and not negative:
            texts = (prompt.text, *(str(message["content"]) for message in prompt.messages))
            words.setdefault(expert, set()).update(" ".join(texts).lower().split())
    found = []
    for i, mine in words.items():
        for j in range(i):
            theirs = words.get(j, set())
            if min(len(mine), len(theirs)) < _ALIKE * max(len(mine), len(theirs)):
                continue
            share = len(mine & theirs) / max(len(mine | theirs), 1)
            if share >= _ALIKE:
                (word, number), path = recipe.numbered[j][0], recipe.numbered[i][0]
                what = f"{share:.0%} of the words in its prompts and in those of {word}[{number}] "
                what += "are the same: the router can hardly tell them apart"
                fix = "Give each expert five or more inputs that are typical of it."
                found.append(Finding(what, fix, path, warning=True))
                break
    return found


def _placeholders(recipe: Recipe, prompts: Sequence[ExpertPrompt]) -> list[Finding]:
    """Warn of prompts that a starter recipe has in place of the user's."""
    if not isinstance(recipe, MoeRecipe):
        return []
    left = {expert for expert, _, prompt in prompts if expert >= 0 and is_placeholder(prompt.text)}
    if not left:
        return []
    places = [recipe.numbered[i][0] for i in sorted(left)]
    named = ", ".join(f"{word}[{number}]" for word, number in places)
    what = f"prompts of {named} are the placeholders of `moeforge new`: a router that is fitted to "
    what += "them sends tokens anywhere"
    fix = "Write texts that this expert should get, as many as you can, or name a prompts_file."
    return [Finding(what, fix, (*places[0], "positive_prompts"), warning=True)]


def _tokens_without_rows(padding: Padding | None) -> list[Finding]:
    """Warn of a tokenizer that has more tokens than the embeddings it is copied for have rows."""
    if padding is None or padding.tokens <= padding.rows:
        return []
    what = f"{padding.model}: its tokenizer has {padding.tokens} tokens, its embeddings have "
    what += f"{padding.rows} rows"
    fix = "Text with the last tokens cannot be run: use the tokenizer that the model came with."
    return [Finding(what, fix, warning=True)]


def _padding(planner: Planner, plan: Plan) -> Padding | None:
    """Return how embeddings and tokenizer differ in the model whose tokenizer the output gets.

    Told of tokenizer.json only: other files must be converted, which takes seconds.
    """
    model = next((model for model in planner.opened if model.donor is plan.donor), None)
    count = rows(model) if model else None
    if model is None or not count or plan.tokenizer is not None:
        return None
    folder = model.donor.folder
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    try:
        entries = 1 + max(model.ids.values(), default=-1)
    except MoeforgeError:
        return None  # said elsewhere, where it matters
    return Padding(model.label, count, entries) if entries != count else None


def planner_for(loaded: LoadedRecipe, *, offline: bool) -> Planner:
    """Return a planner that opens the models of a recipe.

    Args:
        loaded: the recipe.
        offline: use only what is in the local Hub cache.
    """

    def open_reference(reference: Reference | Adapter) -> Source:
        if isinstance(reference, Adapter):
            return open_adapter(
                reference.model,
                reference.revision,
                beside=loaded.folder,
                offline=offline,
                commit=loaded.commits.get(str(reference)),
            )
        return open_source(
            reference.model,
            reference.revision,
            reference.subfolder,
            beside=loaded.folder,
            offline=offline,
            commit=loaded.commits.get(str(reference.model_copy(update={"lora": None}))),
        )

    return Planner(open_reference)


def prepare(recipe: str | Path | dict[str, Any] | LoadedRecipe, *, offline: bool) -> Prepared:
    """Do everything that needs no weights.

    Raises:
        MoeforgeError: with everything that is wrong; its kind is that of the first thing.
    """
    loaded = recipe if isinstance(recipe, LoadedRecipe) else recipes.load(recipe)
    return prepare_with(loaded, planner_for(loaded, offline=offline))


def prepare_with(loaded: LoadedRecipe, planner: Planner) -> Prepared:
    """Do everything that needs no weights, with a planner that knows what it opened afterwards.

    Raises:
        MoeforgeError: with everything that is wrong; its kind is that of the first thing.
    """
    findings = [
        Finding(f"{text} does not exist", path=("evaluate", label))
        for label, text in loaded.recipe.evaluate.items()
        if not loaded.find(text).is_file()
    ]
    prompts = _read_prompts(loaded, loaded.recipe, findings)
    if isinstance(loaded.recipe, MoeRecipe) and loaded.recipe.tune is not None:
        has_prompts = any(expert.has_prompts for expert in loaded.recipe.experts)
        findings += tuning.problems(loaded.recipe.tune, loaded.find, has_prompts=has_prompts)
    try:
        plan = planner.plan(loaded.recipe)
    except MoeforgeError as error:
        raise type(error)(*loaded.place([*error.findings, *findings])) from error.__cause__
    _check_tokenizer(plan, loaded.recipe, prompts, findings)
    if not findings:
        _check_labels(planner, loaded.recipe, findings)
    folders = (source.folder for source in plan.sources.values())
    findings += differing_modules(plan.donor.folder, folders)
    if findings:
        raise PlanError(*loaded.place(findings))
    padding = _padding(planner, plan)
    remarks = loaded.place(
        [
            *_placeholders(loaded.recipe, prompts),
            *_alike(loaded, prompts),
            *_tokens_without_rows(padding),
        ]
    )
    return Prepared(loaded, planner, plan, prompts, remarks, padding)

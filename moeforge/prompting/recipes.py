"""Owns prompts of recipes: selecting those that a build reads, and what overlaps before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeforge import recipe as recipes
from moeforge.errors import Finding, RecipeError
from moeforge.prepare import ExpertPrompt, Prepared
from moeforge.prompting.embed import Embed, Progress, embedder
from moeforge.prompting.overlap import Overlap, overlap
from moeforge.prompting.piles import Pile
from moeforge.prompting.selection import select
from moeforge.recipe import Expert, LoadedRecipe, MoeRecipe


@dataclass(frozen=True)
class _Entry:
    """An expert with prompts, and where it stands in the recipe."""

    expert: Expert
    path: tuple[str | int, ...]
    pile: Pile


def _entries(loaded: LoadedRecipe) -> list[_Entry]:
    """Return the experts of a mixture, then its shared ones that have prompts.

    Their places are the numbers that `Prepared.prompts` gives them.

    Raises:
        RecipeError: a prompts file cannot be used.
    """
    recipe = loaded.recipe
    assert isinstance(recipe, MoeRecipe)
    entries = []
    for path, expert in recipe.numbered:
        try:
            prompts = loaded.expert_prompts(expert)
        except ValueError as error:
            placed = loaded.place([Finding(str(error), path=(*path, "prompts_file"))])
            raise RecipeError(*placed) from None
        label = f"{path[0]}[{path[1]}]"
        if path[0] == "experts" and not isinstance(expert.source_model, tuple):
            label += f" ({expert.source_model})"
        entries.append(_Entry(expert, path, Pile(label, prompts, len(expert.positive_prompts))))
    return entries


def _selected(
    entries: Sequence[_Entry], embed: Callable[[], Embed], note: Callable[[Finding], None]
) -> list[Pile]:
    """Return the piles, cut down where the recipe asks for it; `embed` is called only then."""
    counts = [entry.expert.select for entry in entries]
    if not any(counts):
        return [entry.pile for entry in entries]
    kept = select([entry.pile for entry in entries], counts, embed())
    for entry, each in zip(entries, kept, strict=True):
        for finding in each.findings():
            note(replace(finding, path=(*entry.path, "select")))
    return [replace(e.pile, prompts=each.prompts) for e, each in zip(entries, kept, strict=True)]


def with_selection(
    prepared: Prepared,
    *,
    device: str = "cpu",
    offline: bool = False,
    progress: Progress = lambda phase, done, total: None,
    note: Callable[[Finding], None] = lambda finding: None,
) -> Prepared:
    """Return a prepared mixture that reads the prompts which `select` keeps.

    The same object where no expert says `select`, or the gate mode reads no prompts. Negative
    prompts stay, and so do those that are nobody's.

    Args:
        prepared: a recipe, planned.
        device: torch device of the embedding model.
        offline: use only what is in the local Hub cache.
        progress: told the texts embedded.
        note: told what is worth knowing.

    Raises:
        RecipeError: a prompts file cannot be used, or has no texts.
        SourceError, HubError: the embedding model cannot be used.
    """
    loaded, recipe = prepared.loaded, prepared.loaded.recipe
    if not isinstance(recipe, MoeRecipe) or not prepared.prompts:
        return prepared
    if not any(expert.select for _, expert in recipe.numbered):
        return prepared
    entries = _entries(loaded)

    def embed() -> Embed:
        return embedder(
            recipe.embedding_model,
            beside=loaded.folder,
            device=device,
            offline=offline,
            progress=progress,
        )

    chosen = _selected(entries, embed, lambda finding: note(_placed(loaded, finding)))
    prompts: list[ExpertPrompt] = []
    for number, (entry, pile) in enumerate(zip(entries, chosen, strict=True)):
        if entry.expert.select:
            prompts += [(number, False, prompt) for prompt in pile.prompts]
    prompts += [
        (number, negative, prompt)
        for number, negative, prompt in prepared.prompts
        if negative or number < 0 or not entries[number].expert.select
    ]
    prompts.sort(key=lambda given: given[0] if given[0] >= 0 else len(entries))
    return replace(prepared, prompts=prompts)


def _placed(loaded: LoadedRecipe, finding: Finding) -> Finding:
    """Return `finding` with its line; a warning stays one."""
    (placed,) = loaded.place([finding])
    return replace(placed, warning=finding.warning)


def overlap_of(
    recipe: str | Path | dict[str, Any],
    *,
    device: str = "cpu",
    offline: bool = False,
    progress: Progress = lambda phase, done, total: None,
    note: Callable[[Finding], None] = lambda finding: None,
) -> tuple[Overlap, tuple[Finding, ...]]:
    """Say how well the prompts of a mixture's experts can be told apart, after `select`.

    Shared experts are left out: every token passes through them.

    Args:
        recipe: path of a YAML file, or the same as a dict. Its models are not looked at.
        device: torch device of the embedding model.
        offline: use only what is in the local Hub cache.
        progress: told the texts embedded.
        note: told what is worth knowing of the selection.

    Returns:
        The matrix, and its findings with their lines in the recipe.

    Raises:
        RecipeError: it is no recipe of a mixture of several experts with prompts, or a file cannot
            be used.
        SourceError, HubError: the embedding model cannot be used.
    """
    loaded = recipes.load(recipe)
    if not isinstance(loaded.recipe, MoeRecipe):
        what = "only mixtures of experts have prompts, and this recipe is none"
        raise RecipeError(Finding(what, "Leave out --prompts."))
    entries = _entries(loaded)
    experts = [entry for entry in entries if entry.path[0] == "experts"]
    if not all(entry.pile.prompts for entry in experts):
        bare = [entry for entry in experts if not entry.pile.prompts]
        what = f"{bare[0].pile.label} has no prompts to compare"
        fix = "Add positive_prompts or prompts_file, or leave out --prompts."
        raise RecipeError(*loaded.place([Finding(what, fix, bare[0].path)]))
    embed = embedder(
        loaded.recipe.embedding_model,
        beside=loaded.folder,
        device=device,
        offline=offline,
        progress=progress,
    )
    chosen = _selected(entries, lambda: embed, lambda finding: note(_placed(loaded, finding)))
    found = overlap(chosen[: len(experts)], embed)
    return found, tuple(_placed(loaded, finding) for finding in found.findings())

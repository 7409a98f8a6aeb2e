"""Owns selecting prompts out of piles: `choose` applied to each, with the others in sight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moeforge.errors import Finding, RecipeError
from moeforge.prompting import piles
from moeforge.prompting.choose import choose, distinctness
from moeforge.prompting.embed import Embed, Progress, embedder
from moeforge.prompting.piles import Pile
from moeforge.recipe import Prompt
from moeforge.recipe.selecting import EMBEDDING_MODEL

if TYPE_CHECKING:
    from moeforge.prompting.embed import Vectors

_SHARED = 1e-6
"""Distinctness below which another pile has the same text."""


@dataclass(frozen=True)
class Kept:
    """What was kept of one pile.

    Attributes:
        label: whose it is.
        prompts: what was kept, the fixed ones first, in the order of the pile.
        wanted: how many were to be chosen; None for all, and then nothing was looked at.
        candidates: prompts to choose from, those with a text that had been met before left out.
        left_out: repeated and blank prompts.
        distinct: for each kept prompt that was chosen, 1 − its largest cosine with another pile's
            prompts, 0 to 1.
    """

    label: str
    prompts: tuple[Prompt, ...]
    wanted: int | None
    candidates: int
    left_out: int
    distinct: tuple[float, ...] = ()

    def findings(self) -> tuple[Finding, ...]:
        """Return what is worth knowing: too few to choose from, and prompts that others have."""
        found = []
        if self.wanted is not None and self.wanted > self.candidates:
            what = f"{self.label}: {self.wanted} prompts are wanted, there are {self.candidates}"
            what += f" besides {self.left_out} repeated or blank ones" if self.left_out else ""
            found.append(Finding(f"{what}; all are kept"))
        if shared := sum(q < _SHARED for q in self.distinct):
            what = f"{self.label}: {shared} of the prompts kept are other experts' prompts too"
            fix = "Select fewer, or give files that have less in common."
            found.append(Finding(what, fix, warning=True))
        return tuple(found)


def select(given: Sequence[Pile], counts: Sequence[int | None], embed: Embed) -> tuple[Kept, ...]:
    """Choose from each pile, as the docstring of `choose` says, with all other piles as the others.

    Args:
        given: the piles.
        counts: how many of each to choose; None keeps all, untouched.
        embed: turns texts into unit vectors.

    Returns:
        What was kept of each pile. The same vectors always give the same choice.

    Raises:
        RecipeError: there is nothing to choose from.
    """
    import numpy as np

    texts = [[piles.text_of(prompt) for prompt in pile.prompts] for pile in given]
    usable = [piles.distinct(each) for each in texts]
    flat = embed([each[n] for each, numbers in zip(texts, usable, strict=True) for n in numbers])
    ends = np.cumsum([len(numbers) for numbers in usable]).tolist()
    parts = np.split(flat, ends[:-1])
    kept = []
    for place, (pile, count) in enumerate(zip(given, counts, strict=True)):
        if count is None:
            kept.append(Kept(pile.label, pile.prompts, None, len(usable[place]), 0))
            continue
        others = [part for other, part in enumerate(parts) if other != place]
        stacked = np.concatenate(others) if others else flat[:0]
        kept.append(_from_pile(pile, usable[place], parts[place], stacked, count))
    return tuple(kept)


def _from_pile(
    pile: Pile, usable: Sequence[int], own: Vectors, others: Vectors, count: int
) -> Kept:
    if not usable:
        what = f"{pile.label}: none of its {len(pile.prompts)} prompts has a text to select by"
        raise RecipeError(Finding(what, "Give other prompts, or do not select."))
    fixed = sum(number < pile.fixed for number in usable)
    factors = distinctness(own, others)
    chosen = choose(own, factors, count, fixed)
    prompts = pile.prompts[: pile.fixed] + tuple(pile.prompts[usable[row]] for row in chosen)
    candidates = len(usable) - fixed
    left_out = len(pile.prompts) - pile.fixed - candidates
    distinct = tuple(float(factors[row]) for row in chosen)
    return Kept(pile.label, prompts, count, candidates, left_out, distinct)


def select_files(
    files: Sequence[Path],
    count: int,
    out: Path,
    *,
    embedding_model: str = EMBEDDING_MODEL,
    device: str = "cpu",
    offline: bool = False,
    progress: Progress = lambda phase, done, total: None,
) -> tuple[Kept, ...]:
    """Keep `count` prompts of each file and write them to `out`, one `.jsonl` for each file.

    Args:
        files: prompts files, one for each expert.
        count: how many to keep of each.
        out: folder to make; the files in it are called as those they come from, with a number in
            front where two have one name.
        embedding_model: folder or Hub id, see `embed.embedder`.
        device: torch device of the embedding model.
        offline: use only what is in the local Hub cache.
        progress: told the texts embedded.

    Raises:
        RecipeError: a file cannot be read, or has no texts.
        BuildError: `out` exists.
        SourceError, HubError: the embedding model cannot be used.
    """
    piles.refuse_existing(out)
    names = piles.labels([file.stem for file in files])
    given = [Pile(name, piles.read(file)) for name, file in zip(names, files, strict=True)]
    embed = embedder(embedding_model, device=device, offline=offline, progress=progress)
    kept = select(given, [count] * len(given), embed)
    piles.write(out, {each.label: each.prompts for each in kept})
    return kept

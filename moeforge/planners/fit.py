"""Owns whether an expert fits a base, and what is lost or weakened where it does."""

from __future__ import annotations

import filecmp
from collections.abc import Iterable, Mapping

from moeforge.errors import Path, SourceError
from moeforge.planners.model import HEAD, Findings, Model, differences, fact, listing, natural
from moeforge.planners.vocab import tokens_of
from moeforge.vocabulary import present

_MUST_AGREE = ("hidden_size", "num_hidden_layers", "hidden_act")
_POSITIONS = ("rope_theta", "rope_scaling", "max_position_embeddings")


def fits(base: Model, expert: Model, findings: Findings, notes: Findings, path: Path) -> bool:
    """Say whether `expert` has the shape of `base`; report why not, or what to expect if so.

    Widths are compared elsewhere: they may be made equal.
    """
    if expert.label == base.label:
        return True
    if base.tied and not expert.tied and HEAD in expert.tensors:
        what = f"{expert.label} has an output head of its own, which is left out"
        notes.error(f"{what}: {base.label} uses its embeddings as head", path=path)
    facts = differences(base, expert)
    for key in _MUST_AGREE:
        if key in facts:
            fix = "Every expert of one MoE needs the shape of the base: use fine-tunes of it."
            if key == "num_hidden_layers":
                fix += " Or give the expert by ranges of layers that cover those of the base."
            findings.error(facts[key], fix, path)
    if positions := [facts[key] for key in _POSITIONS if key in facts]:
        what = f"{'; '.join(positions)}: attention comes from the base"
        fix = "The expert's MLPs will meet activations they were not trained on: expect less of it."
        notes.warn(what, fix, path)
    if "rms_norm_eps" in facts:
        notes.error(f"{facts['rms_norm_eps']}: norms come from the base", path=path)
    _compare_tokens(base, expert, facts.get("vocab_size"), notes, path)
    return not set(facts).intersection(_MUST_AGREE)


def _compare_tokens(
    base: Model, expert: Model, sizes: str | None, notes: Findings, path: Path
) -> None:
    """Warn of tokens that only the expert has: a mixture has the base's embeddings."""
    lost, moved = tokens_lost_and_moved(base, expert)
    fix = (
        "A mixture has one embedding table, the base's, so these would be lost: give a base that "
        "has them if prompts use them."
    )
    if lost:
        what = f"{expert.label} has {len(lost)} tokens that {base.label} lacks: {listing(lost, 5)}"
        notes.warn(what, fix, path)
    elif sizes and lost is None:
        notes.warn(f"{sizes}: tokens it lacks are lost", fix, path)
    elif sizes:
        notes.error(f"{sizes}, with the same tokens: its further rows are unused", path=path)
    if moved:
        what = f"{expert.label} has {len(moved)} tokens under other ids than {base.label}: "
        fix = "Its MLPs know these by other embeddings than the base's: expect less of it."
        notes.warn(what + listing(moved, 5), fix, path)


def tokens_lost_and_moved(base: Model, other: Model) -> tuple[list[str] | None, list[str]]:
    """Return the tokens of `other` that `base` lacks, and those that it has under another id.

    By id; the first is None where it cannot be told.
    """
    if (both := _both(base, other)) is None:
        return None, []
    known, ids = both
    odd = [token for token, index in ids.items() if known.get(token) != index]
    lost = sorted((token for token in odd if token not in known), key=lambda token: ids[token])
    moved = (token for token in odd if token in known)
    return lost, sorted(moved, key=lambda token: known[token])


def _both(base: Model, other: Model) -> tuple[Mapping[str, int], Mapping[str, int]] | None:
    """Return the ids of the tokens of two models; None where one has no tokenizer to be read."""
    mine, theirs = base.donor.folder, other.donor.folder
    if base.tokenizer is None and other.tokenizer is None and mine and theirs:
        files = (mine / "tokenizer.json", theirs / "tokenizer.json")
        # Equal files need no reading: they are large.
        if all(file.exists() for file in files) and filecmp.cmp(*files, shallow=False):
            return {}, {}
        # Nor is transformers, which takes seconds to import, asked whether there is anything.
        if not (present(mine) and present(theirs)):
            return None
    try:
        return base.ids, tokens_of(other).ids
    except SourceError:
        return None


def report_extra(
    base: Model,
    mine: Iterable[str],
    expert: Model,
    theirs: Iterable[str],
    findings: Findings,
    path: Path,
) -> None:
    """Report tensors of an expert that nothing in the base stands for, the head apart.

    Args:
        base: the base.
        mine: names of its tensors, in the words of the family.
        expert: a model that an expert comes from.
        theirs: names of its tensors, in the same words.
        findings: receives what is wrong.
        path: where the expert stands in the recipe.
    """
    if extra := sorted(set(theirs) - set(mine) - {HEAD}, key=natural):
        what = f"{expert.label} has {len(extra)} tensors that {base.label} lacks: {listing(extra)}"
        fix = "No weight is dropped silently, and these have no place: use fine-tunes of the base."
        findings.error(what, fix, path)


def unlike(base: Model, other: Model, others: Iterable[Model] = ()) -> tuple[str, str]:
    """Return what to say and do where `other` is of another family than `base`.

    Args:
        base: the model that the others must fit.
        other: one that does not.
        others: the rest of the recipe's models.
    """

    def known(model: Model) -> str:
        sizes = (("hidden_size", "hidden"), ("num_attention_heads", "heads"))
        facts = [(fact(model.config, key), word) for key, word in sizes]
        said = ", ".join(f"{value} {word}" for value, word in facts if value is not None)
        kind = str(model.config.get("model_type"))
        article = "an" if kind[0] in "aeiou" else "a"
        return f"{article} {kind} model" + (f" ({said})" if said else "")

    kind = base.config.get("model_type")
    fitting = dict.fromkeys(
        model.label
        for model in others
        if model.config.get("model_type") == kind and model.label != base.label
    )
    what = f"{other.label} is {known(other)}, {base.label} {known(base)}"
    fix = "Their layers compute differently: no setting makes one model of them."
    return what, fix + (f" Of one family with {base.label}: {listing(fitting)}." if fitting else "")

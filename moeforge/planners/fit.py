"""Owns whether an expert fits a base, and what is lost or weakened where it does."""

from __future__ import annotations

import filecmp

from moeforge.errors import Path, SourceError
from moeforge.planners.model import Findings, Model, differences, listing
from moeforge.planners.vocab import tokens_of

_MUST_AGREE = ("hidden_size", "num_hidden_layers", "hidden_act")
_POSITIONS = ("rope_theta", "rope_scaling", "max_position_embeddings")


def fits(base: Model, expert: Model, findings: Findings, notes: Findings, path: Path) -> bool:
    """Say whether `expert` has the shape of `base`; report why not, or what to expect if so.

    Widths are compared elsewhere: they may be made equal.
    """
    if expert.label == base.label:
        return True
    facts = differences(base, expert)
    for key in _MUST_AGREE:
        if key in facts:
            fix = "Every expert of one MoE needs the shape of the base: use fine-tunes of it."
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
    lost = _tokens_lost(base, expert)
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


def _tokens_lost(base: Model, expert: Model) -> list[str] | None:
    """Return the tokens of `expert` that `base` lacks, by id; None where that cannot be told."""
    mine, theirs = base.donor.folder, expert.donor.folder
    if base.tokenizer is None and expert.tokenizer is None and mine and theirs:
        files = (mine / "tokenizer.json", theirs / "tokenizer.json")
        # Equal files need no reading: they are large.
        if all(file.exists() for file in files) and filecmp.cmp(*files, shallow=False):
            return []
    try:
        known, ids = tokens_of(base).ids, tokens_of(expert).ids
    except SourceError:
        return None
    return sorted((token for token in ids if token not in known), key=lambda token: ids[token])

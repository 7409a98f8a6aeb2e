"""Owns the choice of a MoE architecture for a dense model, and the reasons for and against each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moeforge import families
from moeforge.configs import Config
from moeforge.dense import complete
from moeforge.errors import Path
from moeforge.families import Accept, Family, Mixture
from moeforge.planners import remote
from moeforge.planners.model import Findings
from moeforge.recipe import NO_HOMES, REMOTE

_MERGEKIT = {"deepseek": "granitemoeshared"}
"""Words of mergekit's recipes for code that is not in transformers, and where the same lies."""


@dataclass(frozen=True)
class Home:
    """A MoE architecture that holds a dense model exactly.

    Attributes:
        family: the family, or None for a mixture with code of its own.
        considered: for each home that was thought of, its name and why it was taken or not.
        notes: what should be known of the result.
    """

    family: Family | None
    considered: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()


def accept(family: Family, config: Config) -> Accept:
    """Return how `family` takes the dense model with this config."""
    return family.accepts[str(config.get("model_type"))]


def in_words_of(family: Family, config: Config) -> Config:
    """Return a dense config in the words that the functions of `family` read."""
    return accept(family, config).config(complete(config))


def objection(family: Family, config: Config, mixture: Mixture) -> str:
    """Return why `family` cannot hold this mixture exactly, or ""."""
    kind = str(config.get("model_type"))
    if kind not in family.accepts:
        return f"it holds {', '.join(sorted(family.accepts))}; this is a {kind} model"
    try:
        full = complete(config)
    except ValueError as error:
        return str(error)
    if reason := accept(family, config).refuse(full):
        return reason
    dense = in_words_of(family, config)
    if not isinstance(dense.get("intermediate_size"), int):
        return "config.json does not say intermediate_size"
    return (
        family.refuse(dense, mixture)
        or _layers_objection(family, dense, mixture)
        or _shared_objection(family, dense, mixture)
    )


def _layers_objection(family: Family, dense: Config, mixture: Mixture) -> str:
    if family.sparse is not None:
        said = family.sparse(dense, mixture)
        return said if isinstance(said, str) else ""
    return "" if all(mixture.sparse) else "it has experts in every layer (layers: all)"


def _shared_objection(family: Family, dense: Config, mixture: Mixture) -> str:
    if not mixture.shared:
        return ""
    if family.shared is None:
        return "it has no shared experts"
    step, most = family.shared.step(dense, mixture), family.shared.most
    if most is not None and mixture.shared > step * most:
        return f"its shared expert is {step * most} wide, those of the recipe {mixture.shared}"
    return ""


def _exotic(family: Family, config: Config, mixture: Mixture) -> str:
    return accept(family, config).exotic(complete(config)) or family.exotic(
        in_words_of(family, config), mixture
    )


def _note(family: Family, config: Config) -> str:
    note = accept(family, config).note
    return note if isinstance(note, str) else note(complete(config))


def _named(word: str, config: Config) -> tuple[list[Family], bool]:
    """Return the families that `word` of a recipe means, and whether it may mean remote code."""
    kind = str(config.get("model_type"))
    if word == "auto":
        return families.candidates(kind), True
    found = [f for f in families.shelf() if f.model_type.startswith(word)]
    # Of families that share the beginning of their names, those that hold the model come first.
    found.sort(key=lambda family: (kind not in family.accepts, family.model_type != word))
    other = next((to for old, to in _MERGEKIT.items() if old.startswith(word)), "")
    if other and not any(kind in family.accepts for family in found):
        found.append(families.load(other))
    return found, REMOTE.startswith(word)


def choose(
    config: Config, word: str, mixture: Mixture, findings: Findings, path: Path
) -> Home | None:
    """Return the home of a dense model, or None after reporting why there is none.

    Args:
        config: the base's raw config.
        word: "auto", "remote", the name of a family, or the start of it.
        mixture: what is wanted.
        findings: receives the reasons.
        path: where the word stands in the recipe.
    """
    word = word.lower()
    named, code = _named(word, config)
    against: list[tuple[str, str]] = []
    for number, family in enumerate(named):
        reason = objection(family, config, mixture)
        exotic = "" if reason else _exotic(family, config, mixture)
        if word == "auto" and exotic:
            reason = f"exact in transformers only: {exotic}"
        if not reason:
            why = "the most portable exact home" if word == "auto" else "the recipe names it"
            taken = (family.model_type, f"taken: {why}")
            rest = _others(named[number + 1 :], config, mixture, code=word == "auto")
            notes = (_note(family, config), exotic)
            return Home(family, (*against, taken, *rest), tuple(filter(None, notes)))
        against.append((family.model_type, reason))
    if code:
        reason = remote.refuse(config, mixture)
        if not reason:
            why = remote.WHY if word == "auto" else "the recipe names it"
            return Home(None, (*against, (REMOTE, f"taken: {why}")), ())
        against.append((REMOTE, reason))
    against += [(name, why) for name, why in NO_HOMES.items() if word != "auto" and word in name]
    kind = str(config.get("model_type"))
    what = f"no MoE architecture holds this {kind} model exactly"
    if word != "auto":
        what = f"architecture {word} does not hold this {kind} model exactly"
    reasons = [f"{name}: {reason}" for name, reason in against]
    findings.error(what, "\n    ".join((*reasons, _advice(word))), path)
    return None


def _advice(word: str) -> str:
    if word == "auto":
        return "Use another base; `moeforge show families` names the dense types that work."
    return "Write architecture: auto to take the most portable home that is exact."


def _others(
    rest: Iterable[Family], config: Config, mixture: Mixture, *, code: bool
) -> list[tuple[str, str]]:
    """Return what is to be said of homes that come after the one taken."""
    said = []
    for family in rest:
        if str(config.get("model_type")) not in family.accepts:
            continue
        reason = objection(family, config, mixture) or _exotic(family, config, mixture)
        said.append((family.model_type, reason or "exact too, but less portable"))
    if code:
        said.append((REMOTE, "not needed: it would bring code of its own"))
    return said

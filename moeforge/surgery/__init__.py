"""Owns what is done to models that are there: experts taken out, regrouped, added, made of one.

Each function writes a recipe and builds it; so the result has a lock file, a card and its checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeforge import forge
from moeforge.errors import Finding, PlanError
from moeforge.forge import Result
from moeforge.planners.model import Findings, from_source
from moeforge.planners.unmixed import Unmixed, unmixed
from moeforge.recipe import AVERAGE
from moeforge.sources import open_source

Numbers = Sequence[int]
GATES = ("random", "uniform_random", "zeros")
"""Gate modes that need no prompts."""

__all__ = ["GATES", "experts", "extract", "upcycle"]


def extract(
    model: str | Path,
    out: str | Path,
    *,
    expert: int | None = None,
    average: bool = False,
    as_type: str | None = None,
    dtype: str | None = None,
    **settings: Any,
) -> Result:
    """Take a dense model out of a mixture of experts.

    Args:
        model: folder or Hub id of the mixture.
        out: output folder.
        expert: number of the expert whose MLPs it gets, from 0.
        average: average all experts instead.
        as_type: model type of the result, where several hold it: llama, mistral, ….
        dtype: dtype of the result; None keeps the mixture's.
        **settings: as of `build`: device, threads, memory, overwrite, offline, verify, ….

    Raises:
        MoeforgeError: with everything that is wrong; nothing was published.
    """
    if average is (expert is not None):
        what = "a dense model has the MLPs of one expert, or the average of all experts'"
        raise PlanError(Finding(what, "Say which: --expert N, or --average."))
    wanted: dict[str, Any] = {"model": str(model), "expert": AVERAGE if average else expert}
    if as_type:
        wanted["model_type"] = as_type
    return forge.build(_with_dtype({"extract": wanted}, dtype), out, **settings)


def experts(
    model: str | Path,
    out: str | Path,
    *,
    keep: Numbers = (),
    drop: Numbers = (),
    duplicate: Numbers = (),
    keep_most: int | None = None,
    text: Sequence[str | Path] = (),
    add: Sequence[str | Path] = (),
    refit: str | Path | None = None,
    top_k: int | None = None,
    dtype: str | None = None,
    **settings: Any,
) -> Result:
    """Make a mixture with other experts out of one.

    Kept experts keep their rows of the routers; with `refit`, routers are fitted anew.

    Args:
        model: folder or Hub id of the mixture.
        out: output folder.
        keep: experts of the result, in this order; all if nothing is said.
        drop: experts that go.
        duplicate: experts that are there once more, with the same rows of the routers.
        keep_most: keep that many in each layer, those that `text` uses most.
        text: files of text or prompts, as of `route`.
        add: dense models whose MLPs become experts; they need `refit`.
        refit: prompts file for all experts; each is wanted where its dense model predicts best.
        top_k: experts that each token passes through; None leaves it.
        dtype: dtype of the result; None keeps the mixture's.
        **settings: as of `build`: device, threads, memory, overwrite, offline, verify, ….

    Raises:
        MoeforgeError: with everything that is wrong; nothing was published.
    """
    offline = bool(settings.get("offline", False))
    mixed = _opened(str(model), offline=offline)
    _refuse_unclear(keep, drop, keep_most, text, add, refit)
    given = any(option is not None for option in (keep_most, refit, top_k, dtype))
    if not (given or keep or drop or duplicate):
        fix = "Give --keep, --drop, --duplicate, --keep-most, --add, --refit or --top-k."
        raise PlanError(Finding(f"nothing about the experts of {model} is to change", fix))
    if keep_most is not None:
        wanted: Any = _most_used(mixed, str(model), keep_most, text, settings)
    else:
        wanted = _chosen(mixed, keep, drop, duplicate)
    if refit is not None:
        recipe = _refitted(mixed, str(model), wanted, list(map(str, add)), str(refit), top_k)
        return forge.build(_with_dtype(recipe, dtype), out, **settings)
    regroup: dict[str, Any] = {"model": str(model), "keep": wanted}
    if top_k is not None:
        regroup["experts_per_token"] = top_k
    return forge.build(_with_dtype({"regroup": regroup}, dtype), out, **settings)


def upcycle(
    model: str | Path,
    out: str | Path,
    *,
    experts: int = 8,
    top_k: int = 2,
    noise: float = 0.0,
    gate: str = "random",
    seed: int = 0,
    architecture: str = "auto",
    dtype: str | None = None,
    **settings: Any,
) -> Result:
    """Make a mixture of copies of one dense model, to be trained on.

    Source: Komatsuzaki et al., "Sparse Upcycling", arXiv 2212.05055. Without noise it computes what
    the dense model computes, whatever the router says.

    Args:
        model: folder or Hub id of the dense model.
        out: output folder.
        experts: number of copies of its MLPs.
        top_k: experts that each token passes through.
        noise: standard deviation of what is added to the weights of each copy.
        gate: one of `GATES`.
        seed: what router and noise follow from.
        architecture: family of the result, as in recipes.
        dtype: dtype of the result; None keeps the model's.
        **settings: as of `build`: device, threads, memory, overwrite, offline, verify, ….

    Raises:
        MoeforgeError: with everything that is wrong; nothing was published.
    """
    if gate not in GATES:
        what = f"gate mode {gate} needs prompts, and copies of one model cannot be told apart"
        raise PlanError(Finding(what, f"Take one of {', '.join(GATES)}."))
    copy: dict[str, Any] = {"source_model": str(model)}
    if noise:
        copy["noise_scale"] = noise
    recipe = {
        "base_model": str(model),
        "experts": [dict(copy) for _ in range(experts)],
        "experts_per_token": top_k,
        "gate_mode": gate,
        "architecture": architecture,
        "seed": seed,
    }
    return forge.build(_with_dtype(recipe, dtype), out, **settings)


def _with_dtype(recipe: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    return {**recipe, "dtype": dtype} if dtype else recipe


def _opened(model: str, *, offline: bool) -> Unmixed:
    """Return the parts of a mixture, from its headers."""
    findings = Findings()
    mixed = unmixed(from_source(open_source(model, offline=offline)), findings, ())
    if mixed is None:
        raise PlanError(*findings)
    return mixed


def _refuse_unclear(
    keep: Numbers,
    drop: Numbers,
    keep_most: int | None,
    text: Sequence[str | Path],
    add: Sequence[str | Path],
    refit: str | Path | None,
) -> None:
    """Refuse wishes that contradict each other, or that leave something open."""
    found = []
    if (keep and drop) or (keep_most is not None and (keep or drop)):
        what = "which experts stay is said twice"
        found.append(Finding(what, "Give one of --keep, --drop and --keep-most."))
    if (keep_most is not None) is not bool(text):
        what = "which experts are used most depends on a text, and is measured on it"
        found.append(Finding(what, "Give --keep-most N and --text FILE together."))
    if keep_most is not None and refit is not None:
        what = "--keep-most keeps other experts in each layer, and routers are fitted to models"
        found.append(Finding(what, "Leave out one of --keep-most and --refit."))
    if add and refit is None:
        what = f"no row of the routers is there for {add[0]}"
        found.append(Finding(what, "Give --refit FILE: prompts that the routers are fitted on."))
    if found:
        raise PlanError(*found)


def _chosen(mixed: Unmixed, keep: Numbers, drop: Numbers, duplicate: Numbers) -> list[int]:
    """Return the numbers of the experts of the result."""
    beyond = [n for n in (*keep, *drop, *duplicate) if not 0 <= n < mixed.experts]
    if beyond:
        what = f"there is no expert {beyond[0]} in {mixed.model.label}"
        raise PlanError(Finding(what, f"Valid: 0 to {mixed.experts - 1}."))
    chosen = list(keep) or [number for number in range(mixed.experts) if number not in drop]
    if not chosen:
        raise PlanError(Finding("no expert is left", "Drop fewer."))
    return [*chosen, *duplicate]


def _most_used(
    mixed: Unmixed, model: str, count: int, text: Sequence[str | Path], settings: Any
) -> list[list[int]]:
    """Return for each layer with experts those that a text uses most, in their order."""
    from moeforge.proof.routing_of import route

    if not 1 <= count <= mixed.experts:
        what = f"{mixed.model.label} has {mixed.experts} experts, and {count} are to be kept"
        raise PlanError(Finding(what, f"Valid: 1 to {mixed.experts}."))
    offline, device = bool(settings.get("offline", False)), settings.get("device", "cpu")
    report = route(model, [Path(file) for file in text], offline=offline, device=device)
    most = (sorted(range(len(load)), key=lambda n: -load[n])[:count] for load in report.load_LE())
    return [sorted(numbers) for numbers in most]


def _refitted(
    mixed: Unmixed, model: str, keep: list[int], add: list[str], prompts: str, top_k: int | None
) -> dict[str, Any]:
    """Return the recipe of a mixture of experts taken out of another, and of further models."""
    taken = [{"extract": {"model": model, "expert": number}} for number in keep]
    return {
        "base_model": taken[0],
        "experts": [{"source_model": source} for source in (*taken, *add)],
        "experts_per_token": mixed.per_token if top_k is None else top_k,
        "architecture": mixed.family.model_type,
        "layers": list(mixed.layers),
        "gate_parameters": {"labels": "loss", "data": prompts},
    }

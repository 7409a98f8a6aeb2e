"""The whole story on one screen: recipe → plan → routers → bytes → proof → folder.

The flags of the command line are the arguments here, with the same names and meanings.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeforge import build_report, engine, sharing, tuning, vouch
from moeforge.bars import Progress, watched
from moeforge.checking import Report, check
from moeforge.checking.needs import needs_of
from moeforge.checking.verdict import judge
from moeforge.engine import Settings
from moeforge.errors import BuildError, Finding, PlanError
from moeforge.output import cards, folder
from moeforge.output.journal import Journal, building
from moeforge.output.layout import DEFAULT_SHARD_SIZE, index, lay_out
from moeforge.output.staging import refuse_existing, refuse_inputs
from moeforge.plans import ROUTERS, Plan
from moeforge.prepare import Prepared, prepare
from moeforge.prompting import with_selection
from moeforge.ranks import Group
from moeforge.recipe import LoadedRecipe, MoeRecipe
from moeforge.routers import Routers, compute_routers, packed, unpacked
from moeforge.shown import Shown, show_size

if TYPE_CHECKING:
    from moeforge.gates import LayerFit
    from moeforge.proof.heldout import HeldOut
    from moeforge.proof.route_report import RouteReport
    from moeforge.proof.verify import Verified

__all__ = ["Progress", "RecipeLike", "Report", "Result", "build", "check", "plan"]

RecipeLike = str | Path | dict[str, Any] | LoadedRecipe


@dataclass(frozen=True, repr=False)
class Result(Shown):
    """A finished build.

    Attributes:
        folder: where the model is.
        plan: how it was made.
        seconds: wall-clock time.
        heldout: losses and routing on held-out text, if the recipe asks for them.
        fits: what the fit of each router found out, where gates were fitted.
        tuned: what training the routers came to, if the recipe asks for it.
        routing: where a mixture sends its tokens; see `build_report.Measured`.
        verified: the checks that it passed; None where they were not asked for.
        notes: what is worth knowing, warnings among it.
    """

    folder: Path
    plan: Plan
    seconds: float
    heldout: HeldOut | None
    fits: tuple[LayerFit, ...] = ()
    tuned: tuning.Tuned | None = None
    routing: RouteReport | None = None
    verified: Verified | None = None
    notes: tuple[Finding, ...] = ()


def plan(recipe: RecipeLike, *, offline: bool = False) -> Plan:
    """Plan a recipe from headers and configs alone; no weight is read or downloaded.

    Args:
        recipe: path of a YAML file, or the same as a dict.
        offline: use only what is in the local Hub cache.

    Raises:
        MoeforgeError: with everything that is wrong.
    """
    return prepare(recipe, offline=offline).plan


def build(
    recipe: RecipeLike,
    out: str | Path | None = None,
    *,
    device: str = "cpu",
    threads: int | None = None,
    memory: int | None = None,
    shard_size: int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    strict: bool = False,
    evict: bool = False,
    offline: bool = False,
    verify: bool = True,
    hash_inputs: bool = False,
    group: Group | None = None,
    progress: Progress | bool = False,
    note: Callable[[Finding], None] = lambda finding: None,
) -> Result:
    """Build the model of a recipe.

    Args:
        recipe: path of a YAML file, or the same as a dict.
        out: output folder; the recipe's stem in the working directory if None.
        device: torch device for arithmetic and routers.
        threads: workers; one per core if None.
        memory: bytes that the process may take, for choosing the slice size.
        shard_size: most bytes of tensors per file.
        overwrite: replace an existing model folder.
        strict: warnings that come before work starts are errors; see `checking.verdict`.
        evict: remove downloads of this build from the Hub's cache when they are used up.
        offline: use only what is in the local Hub cache.
        verify: check the output before it is published.
        hash_inputs: read inputs on this machine whole for the hashes in the lock file.
        group: the processes that make it together, from `ranks.joined`; all of them call this.
        progress: True to see it, in a terminal or a notebook; or what is called with the phase
            ("routers", "download", "compiling", "tensors", "teachers", "router training",
            "held-out text", "routing", "verify"), what is done of it, and all of it; downloads,
            tensors and checks are counted in bytes.
        note: told at once what is worth knowing: before work starts, and of the finished result.

    Raises:
        MoeforgeError: with everything that is wrong; nothing was published.
    """
    began, seen, noted = time.perf_counter(), watched(progress), list[Finding]()

    def remark(finding: Finding) -> None:
        noted.append(finding)
        note(finding)

    prepared = prepare(recipe, offline=offline)
    if evict:
        _refuse_second_reading(prepared, group)
    plan = prepared.plan
    target = Path(out) if out is not None else Path(prepared.loaded.stem)
    if group:
        seen = group.watching(seen)
    local = group.local if group else (0, 1)
    settings = Settings(threads=threads, memory=memory, device=device, evict=evict, local=local)
    shards, fits = lay_out(plan.tensors, shard_size), tuple["LayerFit", ...]()
    refuse_existing(target, overwrite=overwrite)
    cards.yours_alone(target)  # what users wrote there is kept, or nothing is built
    refuse_inputs(target, (source.folder for source in plan.sources.values() if source.folder))
    identity = prepared.fingerprint(shards, device)
    if group:
        sharing.agree(group, identity)
    if group and group.rank:
        sharing.follow(group, plan, shards, settings)
        return Result(target, plan, time.perf_counter() - began, None)
    found = judge(prepared, needs_of(prepared, target, settings, shards, identity), strict=strict)
    for finding in found.heeded():
        remark(finding)
    _heed_limit(plan, settings)
    together = group.together() if group else nullcontext()
    with building(target, identity, overwrite=overwrite, note=remark) as journal, together:
        work = journal.folder
        folder.copy_companions(plan.donor.folder, work)
        if plan.tokenizer:
            plan.tokenizer.write(work)
        if plan.experts:
            prepared = with_selection(
                prepared, device=device, offline=offline, progress=seen, note=remark
            )
            routers = _routers(prepared, journal, device, seen)
            plan = replace(plan, sources={**plan.sources, ROUTERS: routers.source})
            fits = routers.fits
        total = plan.nbytes
        told = lambda done: seen("tensors", done, total)  # noqa: E731
        compiling = lambda done, total: seen("compiling", done, total)  # noqa: E731
        if group:
            sealed = sharing.lead(group, plan, shards, journal, settings, told, compiling, remark)
        else:
            came = lambda done, total: seen("download", done, total)  # noqa: E731
            sealed = engine.run(
                plan,
                shards,
                work,
                settings,
                told,
                kept=journal.kept,
                sealed=journal.add,
                came=came,
                compiling=compiling,
            )
        folder.write_json(work / "config.json", plan.config)
        for name, code in plan.code.items():
            (work / name).write_text(code, encoding="utf-8")
        if text := index(shards):
            (work / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        (work / "moeforge.yml").write_text(prepared.loaded.document.text, encoding="utf-8")
        tuned = tuning.tune_built(
            prepared,
            plan,
            work,
            device=device,
            progress=lambda step: seen("router training", step.number, step.steps),
            teaching=lambda done, total: seen("teachers", done, total),
            changing=journal.forget,
        )
        measured = build_report.measure_and_tell(prepared, plan, work, target, tuned, seen, remark)
        asked = vouch.Asked(device, shard_size, memory, verify, hash_inputs)
        if tuned:
            sealed = {}  # the routers in them were written over
        verified = vouch.vouch(prepared, plan, work, asked, sealed, seen, remark)
    if group:
        group.tell(end=True)
    seconds = time.perf_counter() - began
    facts = (measured.heldout, fits, tuned, measured.routing, verified)
    return Result(target, plan, seconds, *facts, tuple(noted))


def _refuse_second_reading(prepared: Prepared, group: Group | None) -> None:
    """Refuse to remove downloads that something reads again."""
    recipe = prepared.loaded.recipe
    if group:
        what = "--evict works with one process: the others may still read what one is done with"
        raise PlanError(Finding(what, "Leave it out, or build with one process."))
    tune = recipe.tune if isinstance(recipe, MoeRecipe) else None
    if recipe.evaluate or (tune and tune.teach):
        word = "evaluate" if recipe.evaluate else "tune"
        what = f"{word} reads the models again when the output is there, and --evict removes them"
        raise PlanError(*prepared.loaded.place([Finding(what, "Leave out one of them.", (word,))]))


def _routers(prepared: Prepared, journal: Journal, device: str, progress: Progress) -> Routers:
    """Return the router weights: those of an earlier run of this build, or new ones."""
    if journal.routers is not None:
        return unpacked(journal.routers)
    routers = compute_routers(prepared, journal.folder, device, progress)
    journal.keep_routers(packed(routers))
    return routers


def _heed_limit(plan: Plan, settings: Settings) -> None:
    """Refuse what does not fit into the memory that it may take."""
    peak = engine.peak_memory(plan, settings)
    if settings.memory and peak > settings.memory:
        allowed = f"--memory allows {show_size(settings.memory)}"
        what = f"this build needs about {show_size(peak)}, {allowed}"
        raise BuildError(Finding(what, "Allow more, or use fewer --threads."))

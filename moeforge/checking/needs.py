"""Owns what a build needs of the machine, and what the machine has: memory, disk, time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from moeforge import engine, gates, methods
from moeforge.dense import hidden_size, mlp_width
from moeforge.engine import Settings
from moeforge.errors import Finding
from moeforge.output.journal import unfinished
from moeforge.output.layout import Shard, lay_out
from moeforge.planners.model import reads
from moeforge.plans import Merge, Plan, inputs, pieces
from moeforge.prepare import Prepared
from moeforge.proof.routing_of import SHORT_PART
from moeforge.recipe import MoeRecipe
from moeforge.shown import show_size
from moeforge.sources.hub import HubSource
from moeforge.system import free_memory
from moeforge.tensors import FLOAT32

TRANSFORMERS = 200_000_000
"""Bytes that importing transformers and accelerate adds, measured; see docs/architecture.md."""
WRITE = 0.5e9
"""Bytes per second that are written, a fresh file on a plain disk; reading is as fast or faster."""
DOWNLOAD = 50e6
"""Bytes per second that come from the Hub on a common connection."""
SIMPLE, MEASURED, SORTED = 1e-9, 3e-9, 10e-9
"""Seconds of one core for each element of an input: elementwise methods, those that look at the
whole tensor first, and those that sort every row. See docs/performance.md."""
_TOKEN = 2
"""Bytes of text per token, at least; with large vocabularies there are about four."""


@dataclass(frozen=True)
class Needs:
    """What a build needs, and what there is now; bytes, and seconds.

    Attributes:
        memory: estimated peak, gates included.
        memory_free: what the machine, or the container, can still give.
        gpu: estimated peak on the GPUs together; None where the CPU computes.
        gpu_free: what is free there.
        disk: the weights that are still to be written.
        disk_free: what is free where it goes.
        saved: what of it `dtype: bfloat16` would save.
        download: weights that are not in the Hub's cache yet.
        cache_free: what is free where the cache lies.
        seconds: without gates and evaluation, which depend on the texts.
        folder: where the output goes.
        cache: where the Hub's cache lies; None where no model comes from the Hub.
        files: the weights files of the output.
        kept: those of them that a stopped run of this build has finished.
        looking: estimated peak while a finished mixture is run, which is left out where it takes
            more than a part of the free memory; 0 where it is left out.
    """

    memory: int
    memory_free: int
    gpu: int | None
    gpu_free: int | None
    disk: int
    disk_free: int
    saved: int
    download: int
    cache_free: int
    seconds: float
    folder: Path
    cache: Path | None
    files: int
    kept: int
    looking: int

    def errors(self) -> list[Finding]:
        """Return what the disks cannot hold."""
        here, there = show_size(self.disk), show_size(self.download)
        less = f", or write dtype: bfloat16 (saves {show_size(self.saved)})" if self.saved else ""
        room = f"Choose another disk with -o{less}."
        if self.download and self.cache and _device(self.folder) == _device(self.cache):
            if self.disk + self.download <= self.disk_free:
                return []
            what = f"the build needs {here} in {self.folder} and {there} in the Hub's cache "
            what += f"{self.cache}; the disk of both has {show_size(self.disk_free)} free"
            return [Finding(what, room)]
        found = []
        if self.disk > self.disk_free:
            left = f"what is left of the output ({self.files - self.kept} of {self.files} files)"
            what = f"{left if self.kept else 'the output'} takes {here}, "
            what += f"{self.folder} has {show_size(self.disk_free)} free"
            found.append(Finding(what, room))
        if self.download > self.cache_free:
            free = show_size(self.cache_free)
            what = f"{there} are to be downloaded to {self.cache}, which has {free} free"
            found.append(Finding(what, "Let HF_HUB_CACHE name a folder on another disk."))
        return found

    def warnings(self) -> list[Finding]:
        """Return what is short and may still do."""
        found = []
        if self.memory > self.memory_free:
            what = f"the build takes about {show_size(self.memory)} of memory, "
            what += f"{show_size(self.memory_free)} are free"
            fix = "Fewer --threads or less --memory make slices smaller; end other programs."
            found.append(Finding(what, fix, warning=True))
        if self.gpu and self.gpu_free is not None and self.gpu > self.gpu_free:
            what = f"the GPU needs about {show_size(self.gpu)}, {show_size(self.gpu_free)} are free"
            found.append(Finding(what, "Leave --device out to use the CPU.", warning=True))
        return found


def _device(path: Path) -> int:
    return next(p for p in (path, *path.absolute().parents) if p.exists()).stat().st_dev


def _compute_seconds(plan: Plan, workers: int) -> float:
    total = 0.0
    for tensor in plan.tensors:
        for expr, spec in pieces(tensor):
            if isinstance(expr, Merge):
                method = methods.load(expr.method)
                cost = SIMPLE if method.measure is None and not method.random else MEASURED
                cost = SORTED if expr.method.startswith("della") else cost
                total += cost * spec.numel * len(inputs(expr))
    return total / workers


def _reads_prompts(plan: Plan) -> bool:
    return plan.experts is not None and gates.load(plan.experts.gate_mode).needs_prompts


def router_memory(plan: Plan) -> int:
    """Return the memory in bytes that running one layer of the base takes, prompts apart.

    The base is run one layer at a time, in float32, beside the interpreter with transformers. What
    the prompts take is added by `prompt_memory`.
    """
    config = plan.config
    hidden = hidden_size(config) or 0
    wide = mlp_width(config)
    # Four attention projections and three of the MLP, twice while a layer is read, two experts'
    # MLPs, and the two H×H float64 moments of a fit. Measured 1.22 GB where this says 1.30 GB.
    layer, expert = 4 * hidden * (4 * hidden + 3 * wide), 4 * hidden * 3 * wide
    return engine.INTERPRETER + TRANSFORMERS + 2 * layer + 2 * expert + 32 * hidden**2


def _looking(plan: Plan) -> int:
    """Return the memory that looking at a finished mixture takes; 0 where that is left out.

    transformers joins its experts, so its weights are in memory and not only mapped.
    """
    loaded = 4 * plan.parameters <= SHORT_PART * free_memory()
    return engine.INTERPRETER + TRANSFORMERS + plan.nbytes if plan.experts and loaded else 0


def prompt_memory(prepared: Prepared) -> int:
    """Return the most memory in bytes that the prompts of a recipe take while routers are made.

    What each token met on its way into a layer and into its MLP is kept in float32; the logistic
    fit keeps the latter in float64 too.
    """
    recipe = prepared.loaded.recipe
    if not isinstance(recipe, MoeRecipe):
        return 0
    texts = [
        text
        for _, _, prompt in prepared.prompts
        for text in (prompt.text, *(str(message["content"]) for message in prompt.messages))
    ]
    tokens = sum(len(text.encode()) for text in texts) // _TOKEN
    logistic = recipe.gate_mode == "fitted" and recipe.gate_parameters.method == "logistic"
    return tokens * (hidden_size(prepared.plan.config) or 0) * (8 + 8 * logistic)


def peak_memory(prepared: Prepared, settings: Settings, *, routers: bool = True) -> int:
    """Return an estimate of a build's peak memory in bytes: the engine's, or that of the gates.

    Args:
        prepared: what is to be built.
        settings: how.
        routers: the router weights of a mixture are still to be made.
    """
    plan, peak = prepared.plan, engine.peak_memory(prepared.plan, settings)
    if routers and _reads_prompts(plan):
        return max(peak, router_memory(plan) + prompt_memory(prepared))
    return peak


def needs_of(
    prepared: Prepared,
    out: Path,
    settings: Settings,
    shards: Sequence[Shard] | None = None,
    identity: str | None = None,
) -> Needs:
    """Return what a build takes here, or what is left of one that was stopped; reads no weights.

    Args:
        prepared: what is to be built.
        out: the output folder.
        settings: how. With `evict` downloads are removed when they are used up, so that of each
            model one file must find room at a time, at the least.
        shards: the files of the output; those of the default size if None.
        identity: fingerprint of the build; found out where it matters if None.
    """
    device = settings.device
    shards = lay_out(prepared.plan.tensors) if shards is None else shards
    had = unfinished(out, lambda: identity or prepared.fingerprint(shards, device))
    left = [shard for shard in shards if shard.name not in had.kept]
    plan = prepared.plan
    if had.kept:
        plan = replace(plan, tensors=tuple(e.tensor for shard in left for e in shard.entries))
    memory = peak_memory(replace(prepared, plan=plan), settings, routers=not had.routers)
    gpu = gpu_free = None
    if device != "cpu":
        gpu = engine.gpu_memory(plan, settings)
        if _reads_prompts(plan) and not had.routers:
            layer = router_memory(plan) + prompt_memory(prepared) - engine.INTERPRETER
            gpu = max(gpu, engine.CONTEXT + layer)
        gpu_free = _gpu_free(settings)
    disk = sum(shard.nbytes for shard in left)
    # Another dtype is another build, which goes on with nothing.
    tensors = () if had.kept else plan.tensors
    wide = sum(tensor.spec.nbytes for tensor in tensors if tensor.spec.dtype == FLOAT32)
    hub = {key: source for key, source in plan.sources.items() if isinstance(source, HubSource)}
    # The base is run whole where prompts are read.
    whole = _reads_prompts(plan) and not had.routers
    wanted = _wanted(plan) if hub and not whole else None
    download = sum(
        source.missing_bytes(None if wanted is None else wanted.get(key, ()))
        for key, source in hub.items()
    )
    seconds = max(disk / WRITE, _compute_seconds(plan, settings.workers)) + download / DOWNLOAD
    if settings.evict:
        download = min(download, sum(source.largest_missing for source in hub.values()))
    folder = out.absolute().parent
    cache = _cache() if hub else None
    return Needs(
        memory,
        free_memory(),
        gpu,
        gpu_free,
        disk,
        engine.free_space(folder) + had.freed,
        wide // 2,
        download,
        engine.free_space(cache) if cache else 0,
        seconds,
        folder,
        cache,
        len(shards),
        len(had.kept),
        _looking(prepared.plan),
    )


def _wanted(plan: Plan) -> dict[str, set[str]]:
    """Return the tensors of each source that `plan` reads."""
    found: dict[str, set[str]] = {}
    for tensor in plan.tensors:
        for read in reads(tensor):
            found.setdefault(read.source, set()).add(read.name)
    return found


def _gpu_free(settings: Settings) -> int | None:
    import torch

    if not settings.device.startswith("cuda"):
        return None
    return sum(int(torch.cuda.mem_get_info(device)[0]) for device in settings.devices)


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def needs_json(found: Needs) -> dict[str, Any]:
    """Return needs as plain data."""
    return {
        **{key: value for key, value in vars(found).items() if key not in ("folder", "cache")},
        "seconds": round(found.seconds, 1),
        "folder": str(found.folder),
        "cache": str(found.cache) if found.cache else None,
    }


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def needs_table(found: Needs) -> Table:
    """Return needs as a table: what, how much, of what there is."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    look = show_size(found.looking)
    after = f", {look} while the result is run" if found.looking > found.memory else ""
    free = show_size(found.memory_free)
    table.add_row("memory", f"about {show_size(found.memory)} of {free} free{after}")
    if found.gpu is not None:
        free = "" if found.gpu_free is None else f" of {show_size(found.gpu_free)} free"
        table.add_row("GPU", f"about {show_size(found.gpu)}{free}")
    folder = escape(str(found.folder))
    table.add_row(
        "disk", f"{show_size(found.disk)} of {show_size(found.disk_free)} free in {folder}"
    )
    if found.kept:
        table.add_row(
            "goes on", f"with {found.kept} of {found.files} files that a stopped run left"
        )
    if found.download:
        free = f"{show_size(found.cache_free)} free in {found.cache}"
        table.add_row("download", f"{show_size(found.download)} of {escape(free)}")
    table.add_row("time", f"about {_time(found.seconds)}, gates and evaluation apart")
    return table

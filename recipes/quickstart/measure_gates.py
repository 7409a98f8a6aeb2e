"""Measures every gate mode on one set of models; docs/gates.md shows what it printed.

``python measure_gates.py [SET] [--seeds 3] [--out FILE]`` measures the models of this folder, or of
another that ``train.py --out SET`` has made: the dense models and their plain average, and mixtures
of them for every gate mode, with the attention of the base and of the average. Each seed draws half
of the prompts of every expert for calibration. What tunes routers trains on these, and is stopped
by the other half; held-out text decides nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

import moeforge
from moeforge import catalog, gates
from moeforge.forward import LayerInputs
from moeforge.gates import Gates
from moeforge.gates._tokenize import load_tokenizer
from moeforge.prepare import prepare
from moeforge.proof.heldout import load_output, loss, windows
from moeforge.recipe.tuning import Tuning
from moeforge.routers import gate_input
from moeforge.routing import routers
from moeforge.tuning.data import Documents, of_prompt_file
from moeforge.tuning.train import Trainer

DOMAINS = ("python", "c", "german", "french")
PART = 32
"""Prompts of each expert that a seed draws, of the 64 that there are."""
STEP = 4
"""Every fourth window of the held-out texts is measured."""
TUNING = Tuning(steps=40, batch=8)
STOPPING = 8
"""Prompts of each expert, of those not drawn, that say when tuning stops."""
ACTIVE = (1, 2, len(DOMAINS))
BASES = ("base", "average")
TUNED = "fitted, tuned"


class Found(NamedTuple):
    """One measurement: the losses by domain of mixtures with these gates."""

    gates: str
    base: str
    per_token: int
    seed: int
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The loss averaged over domains."""
        return statistics.fmean(self.losses)


def average(models: Path) -> dict[str, Any]:
    """Return the recipe of the plain average of the experts."""
    parts = [{"model": str(models / domain), "parameters": {"weight": 1}} for domain in DOMAINS]
    return {"merge_method": "linear", "models": parts, "dtype": "float32"}


def mixture(models: Path, base: str, prompts: Path, per_token: int, **more: Any) -> dict[str, Any]:
    """Return the recipe of a mixture of the four experts."""
    experts = [
        {"source_model": str(models / domain), "prompts_file": str(prompts / f"{domain}.jsonl")}
        for domain in DOMAINS
    ]
    attention = str(models / "base") if base == "base" else average(models)
    return {
        "base_model": attention,
        "experts": experts,
        "experts_per_token": per_token,
        "dtype": "float32",
        **more,
    }


def draw(models: Path, folder: Path, seed: int) -> None:
    """Write half of the prompts of each expert to `folder`/drawn, the others to `folder`/rest."""
    for domain in DOMAINS:
        lines = (models / "prompts" / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
        random.Random(f"{domain} {seed}").shuffle(lines)
        for name, part in (("drawn", lines[:PART]), ("rest", lines[PART:])):
            (folder / name).mkdir(parents=True, exist_ok=True)
            text = "\n".join(part) + "\n"
            (folder / name / f"{domain}.jsonl").write_text(text, encoding="utf-8")


def variants() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return gate mode and parameters by what the tables call them; the shelf's, weakest first."""
    modes = [mode for mode in catalog.names("gates") if mode != "fitted"]
    made: dict[str, tuple[str, dict[str, Any]]] = {mode: (mode, {}) for mode in modes}
    made["fitted, ridge"] = ("fitted", {"method": "ridge"})
    made["fitted, off-policy"] = ("fitted", {"on_policy": False})
    return {**made, "fitted": ("fitted", {})}


def texts(models: Path) -> list[torch.Tensor]:
    """Return the held-out windows of each domain."""
    tokenizer = load_tokenizer(models / "base")
    return [windows(tokenizer, models / "heldout" / f"{d}.txt")[::STEP] for d in DOMAINS]


def dense(models: Path, scratch: Path) -> dict[str, tuple[float, ...]]:
    """Return the losses by domain of base, experts and their average."""
    moeforge.build(average(models), scratch / "average")
    folders = {name: models / name for name in ("base", *DOMAINS)}
    held, found = texts(models), {}
    for name, folder in (folders | {"average of the experts": scratch / "average"}).items():
        model = load_output(folder)
        found[name] = tuple(loss(model, ids) for ids in held)
    return found


def tuned(model: Any, prompts: Path, seed: int) -> None:
    """Train the routers of `model` on the drawn prompts, until the others say to stop."""
    tokenizer = load_tokenizer(prompts.parent / "tokenizer")

    def documents(name: str, most: int) -> tuple[tuple[int, ...], ...]:
        files = [prompts / name / f"{domain}.jsonl" for domain in DOMAINS]
        return tuple(d for f in files for d in of_prompt_file(tokenizer, f, TUNING.window)[:most])

    found = routers(model)
    stored = {router.name: torch.float32 for router in found}
    known = Documents(documents("drawn", PART), documents("rest", STOPPING))
    outcome = Trainer(model, found, known, TUNING, seed=seed, stored=stored).run()
    told = ["stopped by", outcome.start, outcome.best, outcome.step]
    print(json.dumps(told), file=sys.stderr, flush=True)


def mixtures(models: Path, scratch: Path, base: str, seed: int) -> list[Found]:
    """Measure all gates of one seed on mixtures with the attention of `base`, on one thread."""
    torch.set_num_threads(1)
    held, prompts = texts(models), scratch / str(seed)
    walk: list[Sequence[LayerInputs]] = []
    same: dict[str, torch.Tensor] = {}  # gates that do not depend on the number of experts
    found = []

    def build(name: str, per_token: int, out: Path) -> torch.Tensor:
        mode, given = variants()[name]
        more = {"gate_mode": mode, "gate_parameters": given, "seed": seed}
        recipe = mixture(models, base, prompts / "drawn", per_token, **more)
        with gate_input(prepare(recipe, offline=True), out, "cpu", lambda *told: None) as data:
            grown = mode == "fitted" and data.on_policy
            if data.prompts and not grown and not walk:
                walk.extend(data.walk())
            made = gates.load(mode).build(replace(data, walk=lambda: iter(walk)))
        weights = made.weights_LEH if isinstance(made, Gates) else made
        if not grown:
            same[name] = weights
        return weights

    for per_token in ACTIVE:
        out = scratch / f"{base}-{per_token}-{seed}"
        plain = mixture(models, base, prompts / "drawn", per_token, gate_mode="random")
        moeforge.build(plain, out, threads=1)
        model = load_output(out)

        def measure(name: str, model: Any = model, per_token: int = per_token) -> None:
            losses = tuple(loss(model, ids) for ids in held)
            found.append(Found(name, base, per_token, seed, losses))
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)

        kept = {}
        for name in variants():
            if base == "base" and name == "fitted, off-policy":
                continue  # as it is by default where the base is one model
            kept[name] = same[name] if name in same else build(name, per_token, out)
            put(model, kept[name])
            measure(name)
        put(model, kept["fitted"])
        tuned(model, prompts, seed)
        measure(TUNED)
    return found


def put(model: Any, weights_LEH: torch.Tensor) -> None:
    """Give the routers of `model` these weights."""
    with torch.no_grad():
        for router, weight in zip(routers(model), weights_LEH, strict=True):
            router.weight.copy_(weight)


# --- tables ---------------------------------------------------------------------------------------
def spread(values: Sequence[float], sign: str = "") -> str:
    """Return mean ± standard deviation over the seeds."""
    return f"{statistics.fmean(values):{sign}.3f} ± {statistics.stdev(values):.3f}"


def table(head: Sequence[str], rows: dict[str, list[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + [f"| {name} | {' | '.join(row)} |" for name, row in rows.items()])


def report(models: dict[str, tuple[float, ...]], found: list[Found]) -> str:
    """Return all tables: dense models, means, gaps, and losses by domain."""

    def chosen(name: str, base: str, per_token: int) -> list[Found]:
        wanted = (name, base, per_token)
        return sorted((f for f in found if f[:3] == wanted), key=lambda f: f.seed)

    columns = [(base, per_token) for base in BASES for per_token in ACTIVE]
    heads = [f"{base}, k={per_token}" for base, per_token in columns]
    names = [*variants(), TUNED]
    domains = [*DOMAINS, "mean"]
    rows = {n: [f"{x:.3f}" for x in (*row, statistics.fmean(row))] for n, row in models.items()}
    parts = ["## Dense models", table(["nats/token", *domains], rows)]

    means = {
        name: [spread([f.mean for f in fs]) if (fs := chosen(name, *c)) else "" for c in columns]
        for name in names
    }
    parts += ["## Mixtures, mean over the domains", table(["gates", *heads], means)]

    def gap(left: str, right: str, base: str, per_token: int) -> str:
        pairs = zip(chosen(left, base, per_token), chosen(right, base, per_token), strict=True)
        return spread([one.mean - other.mean for one, other in pairs], "+")

    plain = statistics.fmean(models["average of the experts"])
    gaps = {
        f"`fitted` - `{name}`": [gap("fitted", name, *c) for c in columns]
        for name in ("hidden", "hidden_avg", "hidden_last", "cheap_embed", "random")
    }
    gaps["`fitted` - average of the experts"] = [
        spread([f.mean - plain for f in chosen("fitted", *c)], "+") for c in columns
    ]
    gaps["tuned - `fitted`"] = [gap(TUNED, "fitted", *c) for c in columns]
    parts += ["## Gaps, seed by seed", table(["gap", *heads], gaps)]

    for base, per_token in columns:
        rows = {}
        for name in names:
            if fs := chosen(name, base, per_token):
                by_domain = zip(*(f.losses for f in fs), strict=True)
                cells = [spread(values) for values in by_domain]
                rows[name] = [*cells, spread([f.mean for f in fs])]
        title = f"## By domain: attention of the {base}, k={per_token}"
        parts += [title, table(["gates", *domains], rows)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Measure, print the tables, and write them where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).resolve().parent
    parser.add_argument("models", type=Path, nargs="?", default=here, help="folder of the set")
    parser.add_argument("--seeds", type=int, default=3, help="draws of prompts, at least two")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    given = parser.parse_args()
    models = given.models.resolve()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        (scratch / "tokenizer").symlink_to(models / "base")
        for seed in range(given.seeds):
            draw(models, scratch / str(seed), seed)
        with ProcessPoolExecutor(2, get_context("spawn")) as pool:
            jobs = [
                pool.submit(mixtures, models, scratch, base, seed)
                for base in BASES
                for seed in range(given.seeds)
            ]
            plain = dense(models, scratch)
            found = [one for job in jobs for one in job.result()]
    text = report(plain, found)
    print(text, end="")
    if given.out:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

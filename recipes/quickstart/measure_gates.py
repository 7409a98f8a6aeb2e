"""Measures the gate modes on the quickstart's models; docs/gates.md shows what it printed.

python recipes/quickstart/measure_gates.py [SEEDS] > gates.md
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import moeforge
from moeforge import gates
from moeforge.forward import LayerInputs
from moeforge.gates import Gates
from moeforge.gates._tokenize import load_tokenizer
from moeforge.prepare import prepare
from moeforge.proof.heldout import load_output, loss, windows
from moeforge.routers import gate_input
from moeforge.routing import routers

HERE = Path(__file__).parent
DOMAINS = ("python", "c", "german", "french")
PART = 32
"""Prompts of each expert that a seed draws, of the 64 that there are."""
STEP = 4
"""Every fourth window of the held-out texts is measured."""


def recipe(base: object, prompts: Path, per_token: int, **more: object) -> dict[str, object]:
    """Return a mixture of the four experts."""
    experts = [
        {"source_model": str(HERE / domain), "prompts_file": str(prompts / f"{domain}.jsonl")}
        for domain in DOMAINS
    ]
    return {"base_model": base, "experts": experts, "experts_per_token": per_token, **more}


def draw(folder: Path, seed: int) -> Path:
    """Write some prompts of each expert to a folder."""
    folder.mkdir()
    for domain in DOMAINS:
        lines = (HERE / "prompts" / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
        chosen = random.Random(f"{domain} {seed}").sample(lines, PART)
        (folder / f"{domain}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return folder


def variants() -> dict[str, tuple[str, dict[str, object]]]:
    """Return gate mode and parameters by what the table calls them."""
    made: dict[str, tuple[str, dict[str, object]]] = {
        mode: (mode, {}) for mode in ("random", "hidden_avg", "hidden")
    }
    for method in ("ridge", "logistic"):
        for on_policy in (False, True):
            for balance in (0, 0.5, 1):
                name = f"{method}, {'on' if on_policy else 'off'}-policy, balance {balance}"
                given = {"method": method, "on_policy": on_policy, "balance": balance}
                made[name] = ("fitted", given)
    return made


def main() -> None:
    """Print the mean held-out loss of every variant as a Markdown table."""
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
    models = [{"model": str(HERE / domain), "parameters": {"weight": 1}} for domain in DOMAINS]
    bases = {"base": str(HERE / "base"), "average": {"merge_method": "linear", "models": models}}
    tokenizer = load_tokenizer(HERE / "base")
    texts = [windows(tokenizer, HERE / "heldout" / f"{d}.txt")[::STEP] for d in DOMAINS]
    walks: dict[tuple[str, int], list[Sequence[LayerInputs]]] = {}
    found: dict[tuple[str, str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        prompts = [draw(Path(scratch) / str(seed), seed) for seed in seeds]
        for (label, base), per_token in ((b, k) for b in bases.items() for k in (1, 2, 4)):
            out = Path(scratch) / f"{label}-{per_token}"
            moeforge.build(
                recipe(base, prompts[0], per_token, gate_mode="random", dtype="float32"), out
            )
            model = load_output(out)
            for seed, (name, (mode, given)) in (
                (seed, variant) for seed in seeds for variant in variants().items()
            ):
                if per_token == len(DOMAINS) and given.get("balance"):
                    continue  # every token goes to every expert
                wanted = recipe(
                    base,
                    prompts[seed],
                    per_token,
                    gate_mode=mode,
                    gate_parameters=given,
                    seed=seed,
                    dtype="float32",
                )
                prepared = prepare(wanted, offline=True)
                with gate_input(prepared, out, "cpu", lambda *told: None) as data:
                    if data.prompts and not given.get("on_policy") and (label, seed) not in walks:
                        walks[label, seed] = list(data.walk())
                    known = partial(walks.get, (label, seed), ())
                    made = gates.load(mode).build(replace(data, walk=known))
                weights = made.weights_LEH if isinstance(made, Gates) else made
                for router, weight in zip(routers(model), weights, strict=True):
                    router.weight.data.copy_(weight)
                mean = statistics.fmean(loss(model, ids) for ids in texts)
                found.setdefault((name, label, per_token), []).append(mean)
                print(json.dumps([label, per_token, seed, name, mean]), file=sys.stderr, flush=True)
    for name, label, per_token in [(n, b, k) for n in variants() for b in bases for k in (1, 2, 4)]:
        found.setdefault((name, label, per_token), [])
    columns = [(label, per_token) for label in bases for per_token in (1, 2, 4)]
    print("| gates |" + "".join(f" {label}, k={k} |" for label, k in columns))
    print("|---|" + "---:|" * len(columns))
    for name in variants():
        cells = [found[name, label, k] for label, k in columns]
        shown = (
            f"{statistics.fmean(c):.3f} ± {statistics.pstdev(c):.3f}" if c else "" for c in cells
        )
        print(f"| {name} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()

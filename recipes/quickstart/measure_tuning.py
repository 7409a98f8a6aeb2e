"""Measures what training routers on text that no expert has seen is worth; docs/gates.md shows it.

``python measure_tuning.py [SET] [--base base|average] [--seeds 3]`` builds a mixture of two experts
per token with fitted gates, trains its routers on files that are on the held-out side of
``corpus.py`` but not in the held-out texts, and measures before and after on those texts. It needs
the packages that ``corpus.py`` names. Each seed draws prompts for the gates and pieces of text.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path

import corpus
import torch
from measure_gates import BASES, DOMAINS, draw, mixture, texts

import moeforge
from moeforge.gates._tokenize import load_tokenizer
from moeforge.proof.heldout import load_output, loss
from moeforge.recipe.tuning import Tuning
from moeforge.routing import routers
from moeforge.tuning.data import Documents
from moeforge.tuning.train import Trainer

HERE = Path(__file__).resolve().parent
PIECE, PIECES = 600, 270
"""Characters of a piece of text, and pieces of each domain: 160 kB."""
TUNING = Tuning(steps=100)


def unseen() -> dict[str, list[str]]:
    """Return, by domain, the files that neither experts nor held-out texts have anything of."""
    known = json.loads((HERE / "sources.json").read_text(encoding="utf-8"))
    found = {}
    for domain in DOMAINS:
        _, held = corpus.collect(domain)
        used = set(known[domain]["heldout"])
        assert used <= {text.name for text in held}, f"{domain}: not the files of sources.json"
        found[domain] = [text.text for text in held if text.name not in used]
    return found


def documents(models: Path, files: dict[str, list[str]], seed: int) -> Documents:
    """Return pieces of text to train on, and every tenth of each domain to stop by."""
    tokenizer = load_tokenizer(models / "base")
    train: list[tuple[int, ...]] = []
    stop: list[tuple[int, ...]] = []
    for domain in DOMAINS:
        pieces = [t[i : i + PIECE] for t in files[domain] for i in range(0, len(t), PIECE)]
        random.Random(f"{domain} {seed}").shuffle(pieces)
        ids = [tuple(tokenizer(p)["input_ids"][: TUNING.window]) for p in pieces[:PIECES]]
        stop += ids[: len(ids) // 10]
        train += ids[len(ids) // 10 :]
    return Documents(tuple(train), tuple(stop))


def main() -> None:
    """Measure, and print a line for each seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="?", default=HERE, help="folder of the set")
    parser.add_argument("--base", choices=BASES, default="base", help="whose attention")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    models, files = given.models.resolve(), unseen()
    held, changes = texts(models), []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(given.seeds):
            scratch = Path(folder) / str(seed)
            draw(models, scratch, seed)
            recipe = mixture(models, given.base, scratch / "drawn", 2, seed=seed)
            moeforge.build(recipe, scratch / "out")
            model = load_output(scratch / "out")
            before = statistics.fmean(loss(model, ids) for ids in held)
            found = routers(model)
            stored = {router.name: torch.float32 for router in found}
            known = documents(models, files, seed)
            Trainer(model, found, known, TUNING, seed=seed, stored=stored).run()
            after = statistics.fmean(loss(model, ids) for ids in held)
            changes.append(after - before)
            print(f"{before:.4f} -> {after:.4f}: {changes[-1]:+.4f}", flush=True)
    print(f"mean {statistics.fmean(changes):+.4f} ± {statistics.stdev(changes):.4f}")


if __name__ == "__main__":
    main()

"""The table of docs/stacks.md: which stacks of each family plan, and why not the others.

`python tests/stack_table.py` writes it.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import tiny
from safetensors.torch import load_file, save_file
from zoo import ZOO

from moeforge import forge
from moeforge.errors import MoeforgeError
from moeforge.planners.layer_lists import UNIFORM

PAGE = Path(__file__).parent.parent / "docs" / "stacks.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"

STACKS = {
    "middle repeated": ((0, 0, 3), (1, 1, 4)),
    "first half twice": ((0, 0, 2), (1, 0, 4)),
    "without the first layer": ((0, 1, 4),),
    "without the last layer": ((0, 0, 3),),
}
"""Model, first layer and end of each slice; every model has four layers."""

_DEPTH = {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"}


def recipe(folders, slices):
    parts = [
        {"sources": [{"model": str(folders[model]), "layer_range": [start, end]}]}
        for model, start, end in slices
    ]
    return {"slices": parts}


def origins(slices):
    return [(model, layer) for model, start, end in slices for layer in range(start, end)]


def checkpoint(models, kind, seed):
    """A tiny checkpoint, with tensors named as published ones."""
    folder = models(kind, seed=seed, with_tokenizer=False, **ZOO[kind])
    if kind == "deepseek_v4":  # transformers saves half of the names as it calls them in memory
        path = folder / "model.safetensors"
        tensors = {
            name.removeprefix("model.").replace("embed_tokens", "embed"): tensor
            for name, tensor in load_file(path).items()
        }
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def table(models):
    """The Markdown table."""
    lines = [
        f"| family | {' | '.join(STACKS)} | what follows, what does not |",
        f"|---|{'---|' * (len(STACKS) + 1)}",
    ]
    for kind in sorted(ZOO):
        cells, said = _row(models, kind)
        lines.append(f"| {kind} | {' | '.join(cells)} | {said} |")
    return "\n".join(lines) + "\n"


def _row(models, kind):
    folders = [checkpoint(models, kind, seed) for seed in (1, 2)]
    cells, changed, reason = [], set(), ""
    whole = None
    for name, slices in STACKS.items():
        try:
            made = forge.plan(recipe(folders, slices))
        except MoeforgeError as error:
            reason = reason or f"{name}: {_reason(error, folders)}"
            cells.append("no")
            continue
        cells.append("yes")
        whole = whole or forge.plan(recipe(folders, ((0, 0, 4),))).config
        changed |= {key for key, value in made.config.items() if whole.get(key) != value}
    follows = ", ".join(f"`{key}`" for key in sorted(changed - _DEPTH))
    alike = "layers are alike" if kind in UNIFORM and not reason and not follows else ""
    return cells, "; ".join(filter(None, (follows, alike, reason)))


def _reason(error, folders):
    text = error.findings[0].what
    for number, folder in enumerate(folders):
        text = text.replace(str(folder), "AB"[number])
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def main():
    with tempfile.TemporaryDirectory() as root:
        made = table(tiny.Maker(Path(root)))
    text = PAGE.read_text()
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    PAGE.write_text(f"{head}\n{made}\n{tail}")


if __name__ == "__main__":
    sys.exit(main())

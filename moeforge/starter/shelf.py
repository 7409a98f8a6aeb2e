"""Owns what the recipes in `recipes/` are made of: the templates, and these answers.

    python -m moeforge.starter.shelf

in the repository writes them again; a test says when that is due.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from moeforge.starter.rendering import Answers, render

SCHEMA = "../docs/schema/recipe.json"

_EXAMPLES = {
    "python": (
        "def quicksort(xs):\n    if len(xs) < 2:\n",
        "import os\nfrom pathlib import Path\n",
    ),
    "c": (
        "#include <stdio.h>\n\nint main(void)\n{\n",
        "typedef struct node { struct node *next; }",
    ),
    "german": ("Die Datei kann nicht gelesen werden.", "Mit dieser Option wird alles angezeigt."),
    "french": ("Le fichier ne peut pas être lu.", "Cette option affiche tous les messages."),
}
_BASE = "quickstart/base"
_PYTHON, _C, _GERMAN, _FRENCH = (f"quickstart/{name}" for name in _EXAMPLES)
_ALL = (_PYTHON, _C, _GERMAN, _FRENCH)


def _heldout(*names: str) -> dict[str, str]:
    return {name: f"quickstart/heldout/{name}.txt" for name in names}


@dataclass(frozen=True)
class Entry:
    """A recipe of the shelf.

    Attributes:
        kind: its kind.
        answers: what it is made of.
        depth: layers of its models, where they do not lie beside it.
    """

    kind: str
    answers: Answers
    depth: int | None = None


SHELF = {
    "soup": Entry("soup", Answers((_PYTHON, _C), _BASE, evaluate=_heldout("python", "c"))),
    "ties": Entry(
        "ties",
        Answers(
            (_PYTHON, _C, _GERMAN),
            _BASE,
            factor=0.3,
            evaluate=_heldout("python", "c", "german"),
        ),
    ),
    "slerp": Entry("slerp", Answers((_GERMAN, _FRENCH), evaluate=_heldout("german", "french"))),
    "moe": Entry(
        "moe",
        Answers(_ALL, _BASE, examples=tuple(_EXAMPLES.values()), evaluate=_heldout(*_EXAMPLES)),
    ),
    "moe-loras": Entry(
        "moe-loras",
        Answers(
            ("./adapters/code", "./adapters/german"),
            "mistralai/Mistral-7B-v0.1",
            prompts=("./prompts/code.jsonl", "./prompts/german.jsonl"),
        ),
    ),
    "moe-merges": Entry(
        "moe-merges",
        Answers(
            _ALL,
            _BASE,
            examples=(
                _EXAMPLES["python"] + _EXAMPLES["c"],
                _EXAMPLES["german"] + _EXAMPLES["french"],
            ),
            evaluate=_heldout(*_EXAMPLES),
        ),
    ),
    "moe-shared": Entry(
        "moe-shared",
        Answers(_ALL, _BASE, examples=tuple(_EXAMPLES.values()), evaluate=_heldout(*_EXAMPLES)),
    ),
    "upcycle": Entry("upcycle", Answers((_BASE,))),
    "upscale": Entry("upscale", Answers(("mistralai/Mistral-7B-v0.1",)), depth=32),
    "frankenmerge": Entry(
        "frankenmerge", Answers((_BASE, _GERMAN), evaluate=_heldout("german")), depth=4
    ),
    "frankenmerge-120b": Entry(
        "frankenmerge",
        Answers(("Xwin-LM/Xwin-LM-70B-V0.1", "Sao10K/Euryale-1.3-L2-70B"), dtype="float16"),
        depth=80,
    ),
    "embedding": Entry(
        "embedding", Answers(("Shitao/bge-hotpotqa", "Shitao/bge-quora"), "BAAI/bge-base-en-v1.5")
    ),
}
"""Recipes by the name of their file."""


def text_of(name: str, folder: Path) -> str:
    """Return the text of a recipe of the shelf.

    Args:
        name: one of `SHELF`.
        folder: where the recipes lie.
    """
    entry = SHELF[name]
    return render(
        entry.kind,
        entry.answers,
        file=f"recipes/{name}.yml",
        schema=SCHEMA,
        beside=folder,
        depth=entry.depth,
    )


def write_all(folder: Path) -> None:
    """Write all recipes of the shelf into `folder`."""
    for name in SHELF:
        (folder / f"{name}.yml").write_text(text_of(name, folder), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write_all(Path(sys.argv[1] if sys.argv[1:] else "recipes"))

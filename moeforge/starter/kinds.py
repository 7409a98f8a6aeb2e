"""Owns which kinds of starter recipes there are, and what each of them asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moeforge.errors import nearest


@dataclass(frozen=True)
class Kind:
    """A goal that people have, and what must be known for a recipe to it.

    Attributes:
        goal: what comes out, in half a sentence.
        models: fewest and most models beside the base; None for no limit.
        what: what a model is called.
        base: whether there is a base beside the models.
        methods: merge methods that it can take, the usual one first; empty where there is no
            choice.
        prompts: for experts made of so many models there can be a prompts file; 0 for none.
        depth: whether the number of layers must be known.
    """

    goal: str
    models: tuple[int, int | None]
    what: str = "fine-tune"
    base: Literal["required", "optional", "none"] = "none"
    methods: tuple[str, ...] = ()
    prompts: int = 0
    depth: bool = False

    @property
    def merges(self) -> bool:
        """Whether models are merged, each of them once."""
        return not self.prompts and not self.depth and self.models[1] != 1

    def experts(self, models: int) -> int:
        """Return how many experts `models` models make."""
        return -(-models // self.prompts) if self.prompts else 0


KINDS = {
    "soup": Kind("the average of fine-tunes of one base", (2, None), base="optional"),
    "ties": Kind(
        "what fine-tunes changed in their base, added up: TIES, DARE, DELLA, …",
        (2, None),
        base="required",
        methods=(
            *("ties", "dare_ties", "dare_linear", "della", "della_linear"),
            *("breadcrumbs", "breadcrumbs_ties"),
        ),
    ),
    "slerp": Kind("from one model to another, layer by layer", (2, 2), "model"),
    "moe": Kind(
        "a mixture of experts out of fine-tunes", (2, None), "expert", "required", prompts=1
    ),
    "moe-loras": Kind(
        "a mixture of experts out of LoRA adapters", (2, None), "adapter", "required", prompts=1
    ),
    "moe-merges": Kind(
        "a mixture whose experts are merges of two", (3, None), "fine-tune", "required", prompts=2
    ),
    "moe-shared": Kind(
        "a mixture with an expert for all tokens", (2, None), "expert", "required", prompts=1
    ),
    "upcycle": Kind("a mixture of copies of one model, to train", (1, 1), "model"),
    "upscale": Kind(
        "one model with most of its layers twice, to train", (1, 1), "model", depth=True
    ),
    "frankenmerge": Kind("layers of two models in turn", (2, 2), depth=True),
    "embedding": Kind("the average of embedding models", (2, None), base="optional"),
}
"""Kinds by name; each has a template of that name."""


def unknown(name: str) -> str:
    """Say that `name` is no kind, with the nearest one."""
    return f'unknown kind "{name}"{nearest(name, KINDS) or "."} Known: {", ".join(KINDS)}.'

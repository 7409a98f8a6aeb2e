"""The shelf of gate modes: one file per way to make router weights, named as recipes name it.

A gate mode is arithmetic on what the base computes on prompts; running the base, tokenizing and
writing are done elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeforge import catalog

if TYPE_CHECKING:
    from torch import Tensor

    from moeforge.forward import LayerInputs


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt of one expert.

    Attributes:
        expert: index of the expert it belongs to.
        negative: it should *not* reach that expert.
        ids: token ids.
        first: index of the first token that counts: 1 where the prompt begins with BOS.
    """

    expert: int
    negative: bool
    ids: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class GateInput:
    """What a gate mode works from. L layers, E experts, H hidden.

    Attributes:
        shape: (L, E, H).
        seed: everything random follows from it.
        prompts: all prompts; empty for modes that need none.
        embed: rows of the embedding matrix for token ids, [ids, H] float32.
        walk: runs the base once over `prompts`; yields for each layer what each prompt met.
    """

    shape: tuple[int, int, int]
    seed: int
    prompts: Sequence[TokenizedPrompt]
    embed: Callable[[Sequence[int]], Tensor]
    walk: Callable[[], Iterator[Sequence[LayerInputs]]]


@dataclass(frozen=True)
class Gate:
    """A gate mode.

    Attributes:
        title: what it does, in half a sentence.
        build: GateInput -> router weights gates_LEH in float32.
        needs_prompts: every expert must have at least one positive prompt.
    """

    title: str
    build: Callable[[GateInput], Tensor]
    needs_prompts: bool


def load(name: str) -> Gate:
    """Return the gate mode in file `name`."""
    gate: Gate = catalog.load("gates", name, "GATE")
    return gate

"""Owns what a fit is to learn: which experts each prompt wants, how much it counts, who judges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeforge.gates import TokenizedPrompt

if TYPE_CHECKING:
    from torch import Tensor

SHARPNESS = 0.1
"""T of soft labels exp(-loss/T): nats per token that make another expert e times less wanted."""
_HELD_OUT = 4
"""Every fourth prompt of an expert is held out while λ and the temperature are chosen."""


@dataclass(frozen=True)
class Labels:
    """What is wanted of each prompt.

    Attributes:
        wanted: distribution over the classes, [classes] float64.
        weights: weight of each of its tokens.
        held: whether it judges and does not teach.
    """

    wanted: tuple[Tensor, ...]
    weights: tuple[float, ...]
    held: tuple[bool, ...]


def wanted(prompt: TokenizedPrompt, experts: int, classes: int) -> Tensor:
    """Return the wanted distribution [classes] in float64.

    The expert; for a negative prompt the class after the experts'; by losses ℓ of experts,
    exp(−ℓ/T) divided by its sum.
    """
    import torch

    result = torch.zeros(classes, dtype=torch.float64)
    if prompt.losses:
        losses = torch.tensor(prompt.losses, dtype=torch.float64)
        result[:experts] = (-losses / SHARPNESS).softmax(-1)
    else:
        result[experts if prompt.negative else prompt.expert] = 1.0
    return result


def held_out(prompts: Sequence[TokenizedPrompt]) -> tuple[bool, ...]:
    """Say for each prompt whether it is held out; nothing is where an expert has but one prompt."""
    counts: Counter[int] = Counter()
    held = []
    for prompt in prompts:
        counts[prompt.expert] += not prompt.negative
        held.append(counts[prompt.expert] % _HELD_OUT == 2 and not prompt.negative)
    return tuple(held) if min(counts.values()) > 1 else (False,) * len(prompts)


def token_weights(prompts: Sequence[TokenizedPrompt], experts: int) -> tuple[float, ...]:
    """Return the weight of a token of each prompt.

    The tokens of every expert weigh one in total; those of prompts without an owner as much as all
    experts together.
    """
    tokens: Counter[int] = Counter()
    for prompt in prompts:
        tokens[prompt.expert] += len(prompt.ids) - prompt.first
    totals = {owner: float(experts) if owner < 0 else 1.0 for owner in tokens}
    return tuple(totals[prompt.expert] / tokens[prompt.expert] for prompt in prompts)


def labels(prompts: Sequence[TokenizedPrompt], experts: int) -> Labels:
    """Return what routers are to learn from `prompts`; with negative ones, E + 1 classes.

    The last has no router row: what looks like a negative prompt is no evidence for any expert.
    """
    classes = experts + any(prompt.negative for prompt in prompts)
    return Labels(
        tuple(wanted(prompt, experts, classes) for prompt in prompts),
        token_weights(prompts, experts),
        held_out(prompts),
    )


def against(prompts: Sequence[TokenizedPrompt], expert: int) -> Labels:
    """Return what tells the prompts of one expert (class 0) from all others (class 1).

    Each of the two classes weighs one in total.
    """
    import torch

    sides = [
        TokenizedPrompt(int(p.negative or p.expert != expert), False, p.ids, p.first)
        for p in prompts
    ]
    eye = torch.eye(2, dtype=torch.float64)
    classes = tuple(eye[side.expert] for side in sides)
    return Labels(classes, token_weights(sides, 2), held_out(sides))

"""Shared by the modes that point each router row at the mean of its expert's prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from moeforge.gates import GateInput, TokenizedPrompt

if TYPE_CHECKING:
    from torch import Tensor

    from moeforge.forward import LayerInputs

_FLOOR = 1e-8
"""Norms up to this stay as they are: a row without direction is zero, not noise."""


def unit(rows: Tensor) -> Tensor:
    """Return `rows` at length one along the last dimension."""
    lengths: Tensor = rows.norm(dim=-1, keepdim=True)
    return rows / lengths.clamp_min(_FLOOR)


def contrast(vectors: list[Tensor], prompts: tuple[TokenizedPrompt, ...], experts: int) -> Tensor:
    """Return for each expert the mean over positive minus the mean over negative prompts, [E, H].

    Args:
        vectors: one [H] for each of `prompts`.
        prompts: whose they are.
        experts: number of experts.
    """
    import torch

    rows = []
    for expert in range(experts):
        row = torch.zeros_like(vectors[0])
        for negative, sign in ((False, 1.0), (True, -1.0)):
            chosen = [
                vector
                for vector, prompt in zip(vectors, prompts, strict=True)
                if prompt.expert == expert and prompt.negative is negative
            ]
            if chosen:
                row = row + sign * torch.stack(chosen).mean(0)
        rows.append(row)
    return torch.stack(rows)


def mean_gates(
    data: GateInput, summarize: Callable[[LayerInputs, TokenizedPrompt], Tensor]
) -> Tensor:
    """Return unit-length gates_LEH from one [H] summary of each layer and prompt."""
    import torch

    prompts = tuple(data.prompts)
    layers = []
    for inputs in data.walk():
        vectors = [summarize(i, prompt) for i, prompt in zip(inputs, prompts, strict=True)]
        layers.append(unit(contrast(vectors, prompts, data.shape[1])).cpu())
    return torch.stack(layers)

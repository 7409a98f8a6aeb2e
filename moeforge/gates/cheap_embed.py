"""cheap_embed: the summed embeddings of each expert's prompts, the same in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeforge.gates import Gate, GateInput
from moeforge.gates._means import unit

if TYPE_CHECKING:
    from torch import Tensor


def build(data: GateInput) -> Tensor:
    """Return unit(positive sum) − unit(negative sum), at unit length; reads embedding rows only."""
    import torch

    layers, experts, hidden = data.shape
    rows = []
    for expert in range(experts):
        row = torch.zeros(hidden)
        for negative, sign in ((False, 1.0), (True, -1.0)):
            ids = [
                token
                for prompt in data.prompts
                if prompt.expert == expert and prompt.negative is negative
                for token in prompt.ids
            ]
            if ids:
                row = row + sign * unit(data.embed(ids).sum(0))
        rows.append(row)
    return unit(torch.stack(rows)).expand(layers, -1, -1).clone()


GATE = Gate("embeddings of the prompts, no model run", build, needs_prompts=True)

"""hidden: each router row is the mean of the router's true input over the expert's prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeforge.forward import LayerInputs
from moeforge.gates import Gate, GateInput, TokenizedPrompt
from moeforge.gates._means import mean_gates

if TYPE_CHECKING:
    from torch import Tensor


def _summarize(inputs: LayerInputs, prompt: TokenizedPrompt) -> Tensor:
    return inputs.mlp_TH[prompt.first :].mean(0)


def build(data: GateInput) -> Tensor:
    """Return the mean MLP input of each expert's prompts, minus its negatives', unit length."""
    return mean_gates(data, _summarize)


GATE = Gate("mean router input over the expert's prompts", build, needs_prompts=True)

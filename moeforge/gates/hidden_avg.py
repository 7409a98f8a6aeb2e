"""hidden_avg: the residual stream entering each layer, averaged over the tokens of each prompt.

mergekit's mode of that name, without its padding, which there is averaged in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeforge.forward import LayerInputs
from moeforge.gates import Gate, GateInput, TokenizedPrompt
from moeforge.gates._means import mean_gates

if TYPE_CHECKING:
    from torch import Tensor


def _summarize(inputs: LayerInputs, prompt: TokenizedPrompt) -> Tensor:
    return inputs.residual_TH.mean(0)


def build(data: GateInput) -> Tensor:
    """Return the mean hidden state of each expert's prompts, minus negatives, unit length."""
    return mean_gates(data, _summarize)


GATE = Gate(
    "residual stream averaged over tokens (mergekit's hidden_avg)", build, needs_prompts=True
)

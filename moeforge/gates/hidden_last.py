"""hidden_last: the residual stream entering each layer, at the last token of each prompt.

mergekit's `hidden`, without its padding: there, the last position of a shorter prompt is padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeforge.forward import LayerInputs
from moeforge.gates import Gate, GateInput, TokenizedPrompt
from moeforge.gates._means import mean_gates

if TYPE_CHECKING:
    from torch import Tensor


def _summarize(inputs: LayerInputs, prompt: TokenizedPrompt) -> Tensor:
    return inputs.residual_TH[-1]


def build(data: GateInput) -> Tensor:
    """Return the mean last hidden state of each expert's prompts, minus negatives, unit length."""
    return mean_gates(data, _summarize)


GATE = Gate("residual stream at the last token (mergekit's hidden)", build, needs_prompts=True)

"""zeros: no preference; every token goes to the experts that win ties, with equal weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeforge.gates import Gate, GateInput

if TYPE_CHECKING:
    from torch import Tensor


def build(data: GateInput) -> Tensor:
    """Return zeros."""
    import torch

    return torch.zeros(data.shape)


GATE = Gate("no preference at all", build, needs_prompts=False)

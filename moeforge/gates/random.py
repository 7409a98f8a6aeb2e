"""random: normal noise; for a router that will be trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeforge.gates import Gate, GateInput

if TYPE_CHECKING:
    from torch import Tensor


def build(data: GateInput) -> Tensor:
    """Return draws from N(0, 1)."""
    import torch

    return torch.randn(data.shape, generator=torch.Generator().manual_seed(data.seed))


GATE = Gate("normal noise, for training afterwards", build, needs_prompts=False)

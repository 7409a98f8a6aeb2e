"""uniform_random: uniform noise at the scale of a fresh linear layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeforge.gates import Gate, GateInput

if TYPE_CHECKING:
    from torch import Tensor


def build(data: GateInput) -> Tensor:
    """Return draws from U(−1/√H, 1/√H)."""
    import torch

    bound = data.shape[2] ** -0.5
    generator = torch.Generator().manual_seed(data.seed)
    return torch.rand(data.shape, generator=generator).mul_(2 * bound).sub_(bound)


GATE = Gate("uniform noise, for training afterwards", build, needs_prompts=False)

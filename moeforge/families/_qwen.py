"""Owns Qwen's shared expert: one MLP of any width, weighed by the sigmoid of a gate."""

from __future__ import annotations

from moeforge.families import Shared, each

_WIDTH = 256
"""Wide enough for quantised blocks; its down projection is zero, so the width changes nothing."""


def gated_shared(mlp: str) -> Shared:
    """Return how a family holds it whose layers' MLPs have template `mlp`."""
    return Shared(
        each(f"{mlp}.shared_expert"),
        needed=True,
        zero_width=lambda config, mixture: min(_WIDTH, mixture.width),
        gate=f"{mlp}.shared_expert_gate.weight",
    )

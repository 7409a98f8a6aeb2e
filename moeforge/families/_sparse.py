"""Owns how config files say which layers of a model have experts."""

from __future__ import annotations

from moeforge.configs import Config
from moeforge.families import Mixture


def qwen_layers(dense: Config, mixture: Mixture) -> Config | str:
    """Say it as the Qwen families do: any set of layers may keep its dense MLP."""
    plain = [layer for layer, sparse in enumerate(mixture.sparse) if not sparse]
    return {"decoder_sparse_step": 1, "mlp_only_layers": plain}


def leading_dense(dense: Config, mixture: Mixture) -> Config | str:
    """Say it as DeepSeek's families do: dense MLPs come first, experts in all layers after."""
    first = mixture.sparse.index(True)
    if not all(mixture.sparse[first:]):
        gap = mixture.sparse.index(False, first)
        return (
            f"layers without experts must come before all others, and layer {gap} follows layer "
            f"{first}, which has them"
        )
    return {"first_k_dense_replace": first}

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


def named_layers(dense: Config, mixture: Mixture) -> Config | str:
    """Say it in a word for each layer."""
    return {"mlp_layer_types": ["sparse" if sparse else "dense" for sparse in mixture.sparse]}


def spaced_layers(dense: Config, mixture: Mixture) -> Config | str:
    """Say it as Ernie does: from a first to a last layer, the n-th, the 2n-th, … have experts."""
    layers = [layer for layer, sparse in enumerate(mixture.sparse) if sparse]
    first, last = layers[0], layers[-1]
    step = layers[1] - first if len(layers) > 1 else 1
    if (first + 1) % step or layers != list(range(first, last + 1, step)):
        return (
            "layers with experts must be neighbours, or every n-th counted from one; here they are "
            f"layers {', '.join(map(str, layers))}, counted from zero"
        )
    return {
        "moe_layer_start_index": first,
        "moe_layer_end_index": last,
        "moe_layer_interval": step,
    }

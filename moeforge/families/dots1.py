"""dots1: a home of qwen3 models in which some layers slide; its router scores by sigmoid."""

from __future__ import annotations

from moeforge.configs import Config
from moeforge.families import (
    LLAMA_LAYER,
    QK_NORMS,
    QKVO_BIASES,
    Accept,
    Family,
    Mixture,
    silu_only,
)
from moeforge.families import _deepseek as deepseek
from moeforge.families._sparse import leading_dense
from moeforge.families._windows import windows


def refuse(dense: Config, mixture: Mixture) -> str:
    """The router needs two experts."""
    return deepseek.too_few(mixture)


def config(dense: Config, mixture: Mixture) -> Config:
    """Write dots1's keys; which layers slide is written out."""
    kinds, window = windows(dense)
    return {
        **deepseek.block(mixture),
        "layer_types": kinds,
        "sliding_window": window,
        "use_sliding_window": None,
        "max_window_layers": dense["num_hidden_layers"],
        "mlp_bias": None,
    }


FAMILY = Family(
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    accepts={"qwen3": Accept(1)},
    router=deepseek.ROUTER,
    experts=deepseek.EXPERTS,
    config=config,
    refuse=refuse,
    exotic=silu_only("dots1"),
    layer=lambda config, layer: (*LLAMA_LAYER, *QK_NORMS),
    optional=QKVO_BIASES,
    sparse_fills=deepseek.FILLS,
    dense_mlp=deepseek.DENSE_MLP,
    sparse=leading_dense,
    shared=deepseek.SHARED,
    score="sigmoid",
    selection_bias=deepseek.BIAS,
)

"""mellum: a home of qwen3 models in which some layers slide; transformers 5 only."""

from __future__ import annotations

from moeforge.configs import Config, rope
from moeforge.families import (
    LLAMA_LAYER,
    QK_NORMS,
    QKVO_BIASES,
    Accept,
    Family,
    Mixture,
    each,
    silu_only,
)
from moeforge.families._sparse import named_layers
from moeforge.families._windows import windows

_LAYER = "model.layers.{layer}"


def config(dense: Config, mixture: Mixture) -> Config:
    """Write Mellum's keys; it has rotary parameters for each kind of layer, here the same."""
    kinds, window = windows(dense)
    return {
        "num_experts": mixture.experts,
        "num_experts_per_tok": mixture.per_token,
        "moe_intermediate_size": mixture.width,
        "norm_topk_prob": True,
        "output_router_logits": False,
        "layer_types": kinds,
        "sliding_window": window,
        "rope_parameters": {kind: rope(dense) for kind in sorted(set(kinds))},
        "rope_theta": None,
        "rope_scaling": None,
        "use_sliding_window": None,
        "max_window_layers": None,
        "mlp_bias": None,
    }


FAMILY = Family(
    model_type="mellum",
    architecture="MellumForCausalLM",
    accepts={"qwen3": Accept(2)},
    router=f"{_LAYER}.mlp.gate.weight",
    experts=each(f"{_LAYER}.mlp.experts.{{expert}}"),
    config=config,
    exotic=silu_only("Mellum"),
    layer=lambda config, layer: (*LLAMA_LAYER, *QK_NORMS),
    optional=QKVO_BIASES,
    dense_mlp=each(f"{_LAYER}.mlp"),
    sparse=named_layers,
)

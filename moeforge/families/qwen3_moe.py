"""qwen3_moe: the home of qwen3 models."""

from __future__ import annotations

from moeforge.configs import Config
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
from moeforge.families._sparse import qwen_layers
from moeforge.families._windows import windows

_LAYER = "model.layers.{layer}"


def refuse(dense: Config, mixture: Mixture) -> str:
    """qwen3_moe slides in all layers or in none."""
    _, window = windows(dense)
    if window:
        return f"Qwen3-MoE cannot mix sliding and full attention (sliding_window is {window})"
    return ""


def config(dense: Config, mixture: Mixture) -> Config:
    """Write Qwen3-MoE's keys; `num_experts` is the spelling that all readers know."""
    return {
        "num_experts": mixture.experts,
        "num_experts_per_tok": mixture.per_token,
        "moe_intermediate_size": mixture.width,
        "norm_topk_prob": True,
        "output_router_logits": False,
        "layer_types": None,
        "use_sliding_window": False,
        "mlp_bias": None,
    }


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    accepts={"qwen3": Accept()},
    router=f"{_LAYER}.mlp.gate.weight",
    experts=each(f"{_LAYER}.mlp.experts.{{expert}}"),
    config=config,
    refuse=refuse,
    exotic=silu_only("Qwen3-MoE"),
    layer=lambda config, layer: (*LLAMA_LAYER, *QK_NORMS),
    optional=QKVO_BIASES,
    dense_mlp=each(f"{_LAYER}.mlp"),
    sparse=qwen_layers,
)

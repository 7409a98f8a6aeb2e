"""qwen3_5_moe_text: the home of qwen3_5_text, whose layers are attention or gated delta nets.

Experts lie in all layers. The shared expert contributes nothing unless the recipe gives one.
"""

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
from moeforge.families._qwen import gated_shared

_MLP = "model.layers.{layer}.mlp"
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_DELTA = tuple(
    f"linear_attn.{name}"
    for name in (
        "A_log",
        "conv1d.weight",
        "dt_bias",
        "in_proj_a.weight",
        "in_proj_b.weight",
        "in_proj_qkv.weight",
        "in_proj_z.weight",
        "norm.weight",
        "out_proj.weight",
    )
)


def _layer_types(config: Config) -> list[str]:
    every = config.get("full_attention_interval", 4)
    return config.get("layer_types") or [
        "linear_attention" if (layer + 1) % every else "full_attention"
        for layer in range(config["num_hidden_layers"])
    ]


def _layer(config: Config, layer: int) -> tuple[str, ...]:
    if _layer_types(config)[layer] == "linear_attention":
        return (*_NORMS, *_DELTA)
    return (*LLAMA_LAYER, *QK_NORMS)


def config(dense: Config, mixture: Mixture) -> Config:
    """Write Qwen3.5-MoE's keys; it always renormalises the weights of the chosen experts."""
    return {
        "num_experts": mixture.experts,
        "num_experts_per_tok": mixture.per_token,
        "moe_intermediate_size": mixture.width,
        "shared_expert_intermediate_size": mixture.shared,
        "layer_types": _layer_types(dense),
        "output_router_logits": False,
        "intermediate_size": None,
        "mlp_bias": None,
    }


FAMILY = Family(
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    accepts={"qwen3_5_text": Accept()},
    router=f"{_MLP}.gate.weight",
    experts=each(f"{_MLP}.experts.{{expert}}"),
    config=config,
    exotic=silu_only("Qwen3.5-MoE"),
    layer=_layer,
    optional=QKVO_BIASES,
    shared=gated_shared(_MLP),
)

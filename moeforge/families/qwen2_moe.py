"""qwen2_moe: a home of qwen2 models, with a shared expert that contributes nothing unless given.

llama.cpp does not renormalise this family's expert weights; granitemoe is the home for GGUF.
"""

from __future__ import annotations

from moeforge.configs import Config
from moeforge.families import LLAMA_LAYER, QKV_BIASES, Accept, Family, Mixture, Shared, each
from moeforge.families._sparse import qwen_layers

_LAYER = "model.layers.{layer}"
_SHARED_WIDTH = 256
"""Wide enough for quantised blocks; its down projection is zero, so the width changes nothing."""


def exotic(dense: Config, mixture: Mixture) -> str:
    """Other engines do not look at the activation."""
    if dense["hidden_act"] != "silu":
        return f"other engines compute Qwen2-MoE with SiLU, this model has {dense['hidden_act']}"
    return ""


def config(dense: Config, mixture: Mixture) -> Config:
    """Write Qwen2-MoE's keys.

    Which layers slide is written out: the MoE family has another rule for it than the dense one,
    for which layers from `max_window_layers` on slide.
    """
    depth = dense["num_hidden_layers"]
    kinds = dense.get("layer_types") or [
        "sliding_attention" if layer >= dense["max_window_layers"] else "full_attention"
        for layer in range(depth)
    ]
    return {
        "num_experts": mixture.experts,
        "num_experts_per_tok": mixture.per_token,
        "moe_intermediate_size": mixture.width,
        "shared_expert_intermediate_size": mixture.shared,
        "norm_topk_prob": True,
        "qkv_bias": True,
        "output_router_logits": False,
        "layer_types": kinds if dense["use_sliding_window"] else ["full_attention"] * depth,
        "attention_bias": None,
        "mlp_bias": None,
    }


FAMILY = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    accepts={"qwen2": Accept()},
    router=f"{_LAYER}.mlp.gate.weight",
    experts=each(f"{_LAYER}.mlp.experts.{{expert}}"),
    config=config,
    exotic=exotic,
    layer=lambda config, layer: (*LLAMA_LAYER, *QKV_BIASES),
    dense_mlp=each(f"{_LAYER}.mlp"),
    sparse=qwen_layers,
    shared=Shared(
        each(f"{_LAYER}.mlp.shared_expert"),
        needed=True,
        zero_width=lambda config, mixture: min(_SHARED_WIDTH, mixture.width),
        gate=f"{_LAYER}.mlp.shared_expert_gate.weight",
    ),
)

"""qwen3_moe: the home of qwen3 models."""

from __future__ import annotations

from moeforge.configs import Config
from moeforge.families import LLAMA_LAYER, QK_NORMS, QKVO_BIASES, Accept, Family, Mixture, each
from moeforge.families._sparse import qwen_layers
from moeforge.families._windows import windows

_LAYER = "model.layers.{layer}"


def refuse(dense: Config, mixture: Mixture) -> str:
    """qwen3_moe slides in all layers or in none."""
    _, window = windows(dense)
    if window:
        return f"Qwen3-MoE cannot mix sliding and full attention (sliding_window is {window})"
    return ""


def exotic(dense: Config, mixture: Mixture) -> str:
    """Other engines do not look at the activation."""
    if dense["hidden_act"] != "silu":
        return f"other engines compute Qwen3-MoE with SiLU, this model has {dense['hidden_act']}"
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
    exotic=exotic,
    layer=lambda config, layer: (*LLAMA_LAYER, *QK_NORMS),
    optional=QKVO_BIASES,
    dense_mlp=each(f"{_LAYER}.mlp"),
    sparse=qwen_layers,
)

"""qwen3_moe: the home of qwen3 models."""

from __future__ import annotations

from moeforge.configs import Config
from moeforge.families import LLAMA_LAYER, Family

_EXPERT = "model.layers.{layer}.mlp.experts.{expert}"
_BIASES = tuple(f"self_attn.{part}_proj.bias" for part in "qkvo")


def refuse(dense: Config) -> str:
    """qwen3_moe slides in all layers or in none."""
    if dense["hidden_act"] != "silu":
        return f"other engines compute Qwen3-MoE with SiLU, this model has {dense['hidden_act']}"
    if dense["use_sliding_window"]:
        return "Qwen3-MoE cannot mix sliding and full attention (use_sliding_window is true)"
    return ""


def config(dense: Config, n_experts: int, per_token: int) -> Config:
    """Write Qwen3-MoE's keys; `num_experts` is the spelling that all readers know."""
    return {
        "num_experts": n_experts,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": dense["intermediate_size"],
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "output_router_logits": False,
        "layer_types": None,
        "mlp_bias": None,
    }


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    accepts={"qwen3": 0},
    router="model.layers.{layer}.mlp.gate.weight",
    experts={
        f"{_EXPERT}.gate_proj.weight": ("gate_proj.weight",),
        f"{_EXPERT}.up_proj.weight": ("up_proj.weight",),
        f"{_EXPERT}.down_proj.weight": ("down_proj.weight",),
    },
    config=config,
    refuse=refuse,
    layer=(*LLAMA_LAYER, "self_attn.q_norm.weight", "self_attn.k_norm.weight"),
    optional=_BIASES,
)

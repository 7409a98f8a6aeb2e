"""mixtral: the portable home of llama and mistral models."""

from __future__ import annotations

from moeforge.configs import Config
from moeforge.families import Family

_EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}"


def refuse(dense: Config) -> str:
    """Mixtral has neither biases nor, in other engines, another activation than SiLU."""
    if dense["attention_bias"] or dense["mlp_bias"]:
        return "Mixtral has no biases, this model has (attention_bias or mlp_bias is true)"
    if dense["hidden_act"] != "silu":
        return f"other engines compute Mixtral with SiLU, this model has {dense['hidden_act']}"
    return ""


def config(dense: Config, n_experts: int, per_token: int) -> Config:
    """Write Mixtral's keys; windows stay as they are (llama has none)."""
    return {
        "num_local_experts": n_experts,
        "num_experts_per_tok": per_token,
        "output_router_logits": False,
        "router_jitter_noise": 0.0,
        "sliding_window": dense.get("sliding_window"),
        "attention_bias": None,
        "mlp_bias": None,
        "pretraining_tp": None,
    }


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    accepts={"llama": 0, "mistral": 0},
    router="model.layers.{layer}.block_sparse_moe.gate.weight",
    experts={
        f"{_EXPERT}.w1.weight": ("gate_proj.weight",),
        f"{_EXPERT}.w2.weight": ("down_proj.weight",),
        f"{_EXPERT}.w3.weight": ("up_proj.weight",),
    },
    config=config,
    refuse=refuse,
)

"""mixtral: the portable home of llama, mistral and other models without biases."""

from __future__ import annotations

from moeforge.configs import Config
from moeforge.families import Accept, Family, Mixture
from moeforge.families._llama import rotated_in_halves, unfused

_EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}"


def refuse(dense: Config, mixture: Mixture) -> str:
    """Mixtral has no biases and rotates whole heads."""
    if dense["attention_bias"] or dense["mlp_bias"]:
        return "Mixtral has no biases, this model has (attention_bias or mlp_bias is true)"
    if dense.get("partial_rotary_factor", 1.0) != 1.0:
        factor = dense["partial_rotary_factor"]
        return f"Mixtral rotates whole heads, this model {factor} of each (partial_rotary_factor)"
    return ""


def exotic(dense: Config, mixture: Mixture) -> str:
    """Other engines do not look at the activation."""
    if dense["hidden_act"] != "silu":
        return f"other engines compute Mixtral with SiLU, this model has {dense['hidden_act']}"
    return ""


def config(dense: Config, mixture: Mixture) -> Config:
    """Write Mixtral's keys; windows stay as they are (llama has none)."""
    return {
        "intermediate_size": mixture.width,
        "num_local_experts": mixture.experts,
        "num_experts_per_tok": mixture.per_token,
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
    accepts={
        "llama": Accept(),
        "mistral": Accept(),
        "phi3": Accept(tensors=unfused),
        "helium": Accept(tensors=rotated_in_halves()),
    },
    router="model.layers.{layer}.block_sparse_moe.gate.weight",
    experts={
        f"{_EXPERT}.w1.weight": ("gate_proj.weight",),
        f"{_EXPERT}.w2.weight": ("down_proj.weight",),
        f"{_EXPERT}.w3.weight": ("up_proj.weight",),
    },
    config=config,
    refuse=refuse,
    exotic=exotic,
)

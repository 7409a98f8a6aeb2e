"""granitemoe: the home of granite; also of qwen2 and of llama with attention biases.

It is llama with an optional bias on all four attention projections and four scalar multipliers.
"""

from __future__ import annotations

from moeforge.configs import Config
from moeforge.families import QKVO_BIASES, Accept, Family, Fill, Mixture

_LAYER = "model.layers.{layer}"


def _has_bias(dense: Config) -> bool:
    return bool(dense["attention_bias"]) or dense["model_type"] == "qwen2"


def refuse(dense: Config, mixture: Mixture) -> str:
    """No MLP bias, no window, and the head size is always hidden / heads."""
    if dense["mlp_bias"]:
        return "GraniteMoe's experts have no biases, this model's MLPs have (mlp_bias is true)"
    if dense["head_dim"] * dense["num_attention_heads"] != dense["hidden_size"]:
        return f"GraniteMoe needs head_dim = hidden / heads, this model has {dense['head_dim']}"
    if dense.get("use_sliding_window"):
        return "GraniteMoe has no sliding attention (use_sliding_window is true)"
    return ""


def exotic(dense: Config, mixture: Mixture) -> str:
    """Other engines do not look at the activation."""
    if dense["hidden_act"] != "silu":
        return f"other engines compute GraniteMoe with SiLU, this model has {dense['hidden_act']}"
    return ""


def config(dense: Config, mixture: Mixture) -> Config:
    """Write GraniteMoe's keys; models other than granite get neutral multipliers."""
    neutral = {
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": dense["head_dim"] ** -0.5,
    }
    own = dense["model_type"] == "granite"
    return {
        **{key: float(dense[key]) if own else value for key, value in neutral.items()},
        "num_local_experts": mixture.experts,
        "num_experts_per_tok": mixture.per_token,
        "attention_bias": _has_bias(dense),
        "output_router_logits": False,
        "layer_types": None,
        "max_window_layers": None,
        "mlp_bias": None,
        "pretraining_tp": None,
        "sliding_window": None,
        "use_sliding_window": None,
    }


def _bias_shape(dense: Config, mixture: Mixture) -> tuple[int, ...]:
    # No such tensor is written where the family is told that there are no biases.
    return (dense["hidden_size"],) if _has_bias(dense) else ()


FAMILY = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    accepts={"granite": Accept(), "llama": Accept(1), "qwen2": Accept(1)},
    router=f"{_LAYER}.block_sparse_moe.router.layer.weight",
    experts={
        f"{_LAYER}.block_sparse_moe.input_linear.weight": ("gate_proj.weight", "up_proj.weight"),
        f"{_LAYER}.block_sparse_moe.output_linear.weight": ("down_proj.weight",),
    },
    config=config,
    refuse=refuse,
    exotic=exotic,
    optional=QKVO_BIASES,
    fills={f"{_LAYER}.self_attn.o_proj.bias": Fill(_bias_shape)},
)

"""cohere2_moe: the home of cohere2 models, and of cohere models without norms on queries and keys.

Attention and experts work side by side on the same normalised input, as in the dense models, so
that the router sees what attention sees.
"""

from __future__ import annotations

from moeforge.configs import Config
from moeforge.families import (
    QKVO_BIASES,
    Accept,
    Family,
    Mixture,
    Shared,
    each,
    silu_only,
)
from moeforge.families._sparse import named_layers

_LAYER = "model.layers.{layer}"
_PARTS = ("input_layernorm.weight", *(f"self_attn.{part}_proj.weight" for part in "qkvo"))
_ENDLESS = 2**30
"""A window that no text fills."""


def refuse_cohere(dense: Config) -> str:
    """The MoE normalises neither queries nor keys."""
    if dense.get("use_qk_norm"):
        return "Cohere2-MoE has no norms on queries and keys, this model has (use_qk_norm is true)"
    return ""


def cohere(dense: Config) -> Config:
    """The MoE rotates sliding layers only, so all layers slide, with a window without end."""
    kinds = ["sliding_attention"] * dense["num_hidden_layers"]
    return {**dense, "sliding_window": _ENDLESS, "layer_types": kinds}


def cohere2(dense: Config) -> Config:
    """Write out which layers slide, as the dense model derives it."""
    pattern = dense.get("sliding_window_pattern") or 4
    kinds = dense.get("layer_types") or [
        "sliding_attention" if layer % pattern else "full_attention"
        for layer in range(1, dense["num_hidden_layers"] + 1)
    ]
    head_dim = dense["hidden_size"] // dense["num_attention_heads"]  # whatever the config says
    return {**dense, "layer_types": kinds, "head_dim": head_dim}


def config(dense: Config, mixture: Mixture) -> Config:
    """Write Cohere2-MoE's keys; the width of the experts is `intermediate_size`."""
    return {
        "num_experts": mixture.experts,
        "num_experts_per_tok": mixture.per_token,
        "intermediate_size": mixture.width,
        "prefix_dense_intermediate_size": dense["intermediate_size"],
        "num_shared_experts": mixture.shared // mixture.width,
        "shared_expert_combination_strategy": "sum",
        "expert_selection_fn": "softmax",
        "norm_topk_prob": True,
        "output_router_logits": False,
        # Only 1 would rotate layers without experts that do not slide.
        "prefix_dense_sliding_window_pattern": 4,
        "sliding_window_pattern": None,
        "mlp_bias": None,
        "pretraining_tp": None,
        "use_qk_norm": None,
    }


FAMILY = Family(
    model_type="cohere2_moe",
    architecture="Cohere2MoeForCausalLM",
    accepts={
        "cohere": Accept(refuse=refuse_cohere, config=cohere),
        "cohere2": Accept(config=cohere2),
    },
    router=f"{_LAYER}.mlp.gate.weight",
    experts=each(f"{_LAYER}.mlp.experts.{{expert}}"),
    config=config,
    exotic=silu_only("Cohere2-MoE"),
    layer=lambda config, layer: _PARTS,
    optional=QKVO_BIASES,
    dense_mlp=each(f"{_LAYER}.mlp"),
    sparse=named_layers,
    shared=Shared(each(f"{_LAYER}.mlp.shared_experts"), step=lambda config, mixture: mixture.width),
)

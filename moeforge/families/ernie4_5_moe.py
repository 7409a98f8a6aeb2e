"""ernie4_5_moe: the home of ernie4_5, whose layers it has as they are."""

from __future__ import annotations

from moeforge.configs import Config
from moeforge.families import (
    Accept,
    Family,
    Fill,
    Mixture,
    Shared,
    each,
    silu_only,
)
from moeforge.families._sparse import spaced_layers

_MLP = "model.layers.{layer}.mlp"
_BIAS = f"{_MLP}.moe_statics.e_score_correction_bias"


def refuse(dense: Config, mixture: Mixture) -> str:
    """With biases the family has one on the output head too, and none in the experts."""
    if dense["use_bias"]:
        return "Ernie4.5-MoE's experts have no biases, this model's MLPs have (use_bias is true)"
    return ""


def config(dense: Config, mixture: Mixture) -> Config:
    """Write Ernie4.5-MoE's keys."""
    return {
        "moe_num_experts": mixture.experts,
        "moe_k": mixture.per_token,
        "moe_intermediate_size": mixture.width,
        "moe_num_shared_experts": mixture.shared // mixture.width,
        "moe_norm_min": 1e-12,
        "use_bias": False,
        "output_router_logits": False,
        "attention_bias": None,
        "mlp_bias": None,
    }


FAMILY = Family(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    accepts={"ernie4_5": Accept()},
    router=f"{_MLP}.gate.weight",
    experts=each(f"{_MLP}.experts.{{expert}}"),
    config=config,
    refuse=refuse,
    exotic=silu_only("Ernie4.5-MoE"),
    sparse_fills={_BIAS: Fill(lambda config, mixture: (1, mixture.experts), dtype="float32")},
    dense_mlp=each(_MLP),
    sparse=spaced_layers,
    shared=Shared(each(f"{_MLP}.shared_experts"), step=lambda config, mixture: mixture.width),
    selection_bias=_BIAS,
)

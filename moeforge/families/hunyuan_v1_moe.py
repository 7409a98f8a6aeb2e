"""hunyuan_v1_moe: the home of hunyuan_v1_dense, with experts and one shared expert in all layers.

The shared expert is as wide as an expert, and of zeros unless the recipe gives one.
"""

from __future__ import annotations

from moeforge.configs import Config
from moeforge.families import (
    LLAMA_LAYER,
    QKVO_BIASES,
    Accept,
    Family,
    Mixture,
    Shared,
    each,
    silu_only,
)

_MLP = "model.layers.{layer}.mlp"
_QK_NORMS = ("self_attn.query_layernorm.weight", "self_attn.key_layernorm.weight")


def config(dense: Config, mixture: Mixture) -> Config:
    """Write HunYuan-MoE's keys; experts have the width that dense MLPs had."""
    return {
        "num_experts": mixture.experts,
        "moe_topk": mixture.per_token,
        "intermediate_size": mixture.width,
        "output_router_logits": False,
        "mlp_bias": None,
    }


FAMILY = Family(
    model_type="hunyuan_v1_moe",
    architecture="HunYuanMoEV1ForCausalLM",
    accepts={"hunyuan_v1_dense": Accept()},
    router=f"{_MLP}.gate.wg.weight",
    experts=each(f"{_MLP}.experts.{{expert}}"),
    config=config,
    exotic=silu_only("HunYuan-MoE"),
    layer=lambda config, layer: (*LLAMA_LAYER, *_QK_NORMS),
    optional=QKVO_BIASES,
    shared=Shared(
        each(f"{_MLP}.shared_mlp"),
        needed=True,
        step=lambda config, mixture: mixture.width,
        most=1,
    ),
)

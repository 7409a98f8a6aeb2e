"""flex_olmo: the home of olmo2 models, norms after attention and experts included.

Like the MLP of olmo2, its router sees the residual stream without a norm before it.
The norm after the experts takes out a common factor of their weights, so that engines which do not
renormalise them (llama.cpp) compute the same.
"""

from __future__ import annotations

from moeforge.configs import Config
from moeforge.families import (
    QKVO_BIASES,
    Accept,
    Family,
    Mixture,
    each,
    silu_only,
)

_LAYER = "model.layers.{layer}"
_NORMS = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
_ATTENTION = (
    *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
)


def config(dense: Config, mixture: Mixture) -> Config:
    """Write FlexOlmo's keys; the width of the experts is `intermediate_size`."""
    return {
        "num_experts": mixture.experts,
        "num_experts_per_tok": mixture.per_token,
        "intermediate_size": mixture.width,
        "norm_topk_prob": True,
        "output_router_logits": False,
        "mlp_bias": None,
    }


FAMILY = Family(
    model_type="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    accepts={"olmo2": Accept()},
    router=f"{_LAYER}.mlp.gate.weight",
    experts=each(f"{_LAYER}.mlp.experts.{{expert}}"),
    config=config,
    exotic=silu_only("FlexOlmo"),
    layer=lambda config, layer: (*_ATTENTION, *_NORMS),
    optional=QKVO_BIASES,
)

"""granitemoe_swa: the home of granite_swa; also of smollm3, whose attention has no sinks.

Each layer has its own kind of attention, its own rotary base (0 for none) and one sink per head: a
logit that takes part in the softmax and has no value.
"""

from __future__ import annotations

from moeforge.configs import Config, rope
from moeforge.families import LLAMA_LAYER, QKVO_BIASES, Accept, Family, Fill, Mixture, _granite

_SINKS = "self_attn.sinks"
_NO_SINK = -30000.0
"""A logit whose exponential is zero in float32, and which float16 can hold."""
_EXOTIC = "an engine that computes this architecture with rotary embeddings in all layers is wrong"


def _smollm3(dense: Config) -> Config:
    depth, every = dense["num_hidden_layers"], dense["no_rope_layer_interval"]
    rotated = dense.get("no_rope_layers") or [(i + 1) % every != 0 for i in range(depth)]
    window = dense["sliding_window"] if dense["use_sliding_window"] else None
    kinds = dense.get("layer_types") or [
        "sliding_attention" if window and not turned else "full_attention" for turned in rotated
    ]
    parameters = rope(dense) or {}
    return {
        **_granite.neutral(dense),
        "layer_types": kinds if window else ["full_attention"] * depth,
        # It must be a number, even where no layer slides.
        "sliding_window": window or dense["max_position_embeddings"],
        "layer_rope_theta": [parameters["rope_theta"] if turned else 0 for turned in rotated],
    }


def _sinks(dense: Config, mixture: Mixture) -> tuple[int, ...]:
    return (dense["num_attention_heads"],)


def layer(dense: Config, number: int) -> tuple[str, ...]:
    """Return the tensors of a layer beside its MLP."""
    return (*LLAMA_LAYER, _SINKS) if dense["model_type"] == "granite_swa" else LLAMA_LAYER


def config(dense: Config, mixture: Mixture) -> Config:
    """Write GraniteMoeSWA's keys; a width of 0 means that there is no shared expert."""
    return {
        **_granite.config(dense, mixture),
        "shared_intermediate_size": mixture.shared,
        "max_window_layers": None,
        "no_rope_layer_interval": None,
        "no_rope_layers": None,
        "use_sliding_window": None,
    }


FAMILY = Family(
    model_type="granitemoe_swa",
    architecture="GraniteMoeSWAForCausalLM",
    accepts={
        "granite_swa": Accept(config=_granite.own),
        "smollm3": Accept(1, config=_smollm3, exotic=lambda dense: _EXOTIC),
    },
    router=f"{_granite.LAYER}.block_sparse_moe.router.weight",
    experts={
        f"{_granite.LAYER}.block_sparse_moe.experts.gate_up_proj": (
            "gate_proj.weight",
            "up_proj.weight",
        ),
        f"{_granite.LAYER}.block_sparse_moe.experts.down_proj": ("down_proj.weight",),
    },
    config=config,
    refuse=_granite.refuse,
    exotic=_granite.activation,
    layer=layer,
    optional=(*QKVO_BIASES, _SINKS),
    fills={**_granite.BIASES, f"{_granite.LAYER}.{_SINKS}": Fill(_sinks, _NO_SINK)},
    shared=_granite.SHARED,
)

"""qwen2_moe: a home of qwen2, and of llama-like models in which some layers slide.

It has a shared expert, which contributes nothing unless the recipe gives one. llama.cpp does not
renormalise this family's expert weights; granitemoe is the home of qwen2 for GGUF.
"""

from __future__ import annotations

from moeforge.configs import Config
from moeforge.families import (
    LLAMA_LAYER,
    QKV_BIASES,
    Accept,
    Family,
    Fill,
    Mixture,
    Shape,
    each,
    silu_only,
)
from moeforge.families._qwen import gated_shared
from moeforge.families._sparse import qwen_layers
from moeforge.families._windows import mixed, windows

_LAYER = "model.layers.{layer}"


def _biased(dense: Config) -> bool:
    return bool(dense["model_type"] == "qwen2")


def refuse(dense: Config, mixture: Mixture) -> str:
    """No bias on the attention's output, none in the experts."""
    if dense["attention_bias"] or dense["mlp_bias"]:
        return (
            "Qwen2-MoE has no bias on o_proj and in the experts, this model has (attention_bias or "
            "mlp_bias is true)"
        )
    return ""


def _mixed_windows(dense: Config) -> str:
    if mixed(dense):
        return (
            "some layers of this model slide and others do not, and engines other than "
            "transformers 5 know no such Qwen2-MoE"
        )
    return ""


def config(dense: Config, mixture: Mixture) -> Config:
    """Write Qwen2-MoE's keys.

    Which layers slide is written out: the MoE family has another rule for it than the dense ones.
    """
    kinds, window = windows(dense)
    return {
        "num_experts": mixture.experts,
        "num_experts_per_tok": mixture.per_token,
        "moe_intermediate_size": mixture.width,
        "shared_expert_intermediate_size": mixture.shared,
        "norm_topk_prob": True,
        "qkv_bias": True,
        "output_router_logits": False,
        "layer_types": kinds,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "attention_bias": None,
        "mlp_bias": None,
        "pretraining_tp": None,
    }


def _zeros(heads: str) -> Fill:
    """Return a bias of zeros for models without: vLLM reads biases whatever the config says."""
    shape: Shape = lambda config, mixture: (  # noqa: E731
        () if _biased(config) else (config[heads] * config["head_dim"],)
    )
    return Fill(shape)


FAMILY = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    accepts={
        "qwen2": Accept(exotic=_mixed_windows),
        "ministral": Accept(3, exotic=_mixed_windows),
        "cwm": Accept(3, exotic=_mixed_windows),
        "llama": Accept(5),
        "mistral": Accept(5),
    },
    router=f"{_LAYER}.mlp.gate.weight",
    experts=each(f"{_LAYER}.mlp.experts.{{expert}}"),
    config=config,
    refuse=refuse,
    exotic=silu_only("Qwen2-MoE"),
    layer=lambda config, layer: (*LLAMA_LAYER, *(QKV_BIASES if _biased(config) else ())),
    fills={
        f"{_LAYER}.self_attn.q_proj.bias": _zeros("num_attention_heads"),
        f"{_LAYER}.self_attn.k_proj.bias": _zeros("num_key_value_heads"),
        f"{_LAYER}.self_attn.v_proj.bias": _zeros("num_key_value_heads"),
    },
    dense_mlp=each(f"{_LAYER}.mlp"),
    sparse=qwen_layers,
    shared=gated_shared(f"{_LAYER}.mlp"),
)

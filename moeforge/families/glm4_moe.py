"""glm4_moe: the home of glm and of phi3 with partly rotated heads; also of llama and qwen2.

Its router scores by sigmoid. Biases on queries, keys and values, none on the attention's output.
"""

from __future__ import annotations

from moeforge.configs import Config
from moeforge.families import (
    QKV_BIASES,
    Accept,
    Family,
    Mixture,
    Tensors,
    llama_layer,
    silu_only,
)
from moeforge.families import _deepseek as deepseek
from moeforge.families._llama import rotated_in_halves, unfused
from moeforge.families._rope import phi3_note, phi3_rope, rotated, whole
from moeforge.families._sparse import leading_dense
from moeforge.families._windows import windows


def _glm(config: Config, tensors: Tensors) -> Tensors:
    return rotated_in_halves(rotated)(config, unfused(config, tensors))


def _no_bias(dense: Config) -> str:
    if dense["attention_bias"] or dense["mlp_bias"]:
        return (
            "Glm4Moe has no bias on o_proj and in the experts, this model has (attention_bias or "
            "mlp_bias is true)"
        )
    return ""


def _with_biases(config: Config) -> Config:
    return {**whole(config), "attention_bias": True}


def refuse(dense: Config, mixture: Mixture) -> str:
    """No window; the router needs two experts."""
    _, window = windows(dense)
    if window:
        return f"Glm4Moe has no sliding attention, this model has (sliding_window is {window})"
    return deepseek.too_few(mixture)


def config(dense: Config, mixture: Mixture) -> Config:
    """Write Glm4Moe's keys."""
    return {
        **deepseek.block(mixture),
        "use_qk_norm": False,
        "attention_bias": dense["attention_bias"],
        "layer_types": None,
        "max_window_layers": None,
        "mlp_bias": None,
        "pretraining_tp": None,
        "sliding_window": None,
        "use_sliding_window": None,
    }


def _layer(config: Config, layer: int) -> tuple[str, ...]:
    return (*llama_layer(config, layer), *(QKV_BIASES if config["attention_bias"] else ()))


FAMILY = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    accepts={
        "glm": Accept(tensors=_glm),
        "phi3": Accept(1, config=phi3_rope, tensors=unfused, note=phi3_note),
        "llama": Accept(8, refuse=_no_bias, config=whole),
        "mistral": Accept(8, config=whole),
        "qwen2": Accept(8, config=_with_biases),
    },
    router=deepseek.ROUTER,
    experts=deepseek.EXPERTS,
    config=config,
    refuse=refuse,
    exotic=silu_only("Glm4Moe"),
    layer=_layer,
    sparse_fills=deepseek.FILLS,
    dense_mlp=deepseek.DENSE_MLP,
    sparse=leading_dense,
    shared=deepseek.SHARED,
    score="sigmoid",
    selection_bias=deepseek.BIAS,
)

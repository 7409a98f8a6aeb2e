"""mixtral: the portable home of llama, mistral and other models without biases.

It rotates whole heads in two halves, scales nothing, and all its layers are alike; what a dense
type does otherwise is put into its weights.
"""

from __future__ import annotations

from moeforge.configs import Config, rope
from moeforge.dense import EMBEDDINGS, HEAD
from moeforge.families import (
    Accept,
    Family,
    Mixture,
    Tensors,
    _gemma,
    silu_only,
)
from moeforge.families._absorb import ROUNDING, absorbed, one_plus_norms, own_head
from moeforge.families._llama import (
    internlm3_refuse,
    rotated_in_halves,
    squared_relu_as_gated,
    unfused,
)
from moeforge.families._rope import phi3_note, phi3_rope, rotated
from moeforge.families._windows import mixed, windows

_EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}"


def refuse(dense: Config, mixture: Mixture) -> str:
    """Mixtral has no biases and rotates whole heads."""
    if dense["attention_bias"] or dense["mlp_bias"]:
        return "Mixtral has no biases, this model has (attention_bias or mlp_bias is true)"
    if rotated(dense) != dense["head_dim"]:
        part = f"{rotated(dense)} of {dense['head_dim']} dimensions"
        return f"Mixtral rotates whole heads, this model {part} of each (partial_rotary_factor)"
    return ""


def config(dense: Config, mixture: Mixture) -> Config:
    """Write Mixtral's keys."""
    return {
        "intermediate_size": mixture.width,
        "num_local_experts": mixture.experts,
        "num_experts_per_tok": mixture.per_token,
        "output_router_logits": False,
        "router_jitter_noise": 0.0,
        "sliding_window": windows(dense)[1],
        **dict.fromkeys(_REMOVED),
    }


_REMOVED = (
    "attention_bias",
    "attention_multiplier",
    "bias",
    "embedding_multiplier",
    "hidden_activation",
    "layer_types",
    "logits_scaling",
    "mlp_bias",
    "partial_rotary_factor",
    "pretraining_tp",
    "qkv_bias",
    "residual_multiplier",
    "use_bias",
)
"""Keys of dense models that Mixtral has no use for, or reads with another meaning."""


def _phi3(dense: Config) -> Config:
    result = phi3_rope(dense)
    if result["rope_parameters"]["partial_rotary_factor"] == 1.0:
        del result["rope_parameters"]["partial_rotary_factor"]
        result.pop("partial_rotary_factor", None)
    return result


def _ministral_refuse(dense: Config) -> str:
    if mixed(dense):
        return "Mixtral slides in all layers or in none, this model in some (layer_types)"
    return ""


def _ministral3(dense: Config) -> Config:
    mine = ("llama_4_scaling_beta", "max_position_embeddings")
    parameters = {key: value for key, value in (rope(dense) or {}).items() if key not in mine}
    return {**dense, "rope_parameters": parameters}


def _ministral3_refuse(dense: Config) -> str:
    if "original_max_position_embeddings" not in (rope(dense) or {}):
        return "config.json does not say original_max_position_embeddings in rope_parameters"
    return ""


def _ministral3_note(dense: Config) -> str:
    parameters = rope(dense) or {}
    if not parameters.get("llama_4_scaling_beta"):
        return ""
    first = parameters["original_max_position_embeddings"]
    return (
        f"exact for the first {first} tokens of a text (original_max_position_embeddings); from "
        "there on Ministral 3 scales its queries (llama_4_scaling_beta), which Mixtral cannot"
    )


def _ernie(dense: Config) -> Config:
    return {**dense, "attention_bias": dense["use_bias"], "mlp_bias": dense["use_bias"]}


def _granite(dense: Config, tensors: Tensors) -> Tensors:
    """Put Granite's multipliers into weights; Mixtral scales scores by head_dim to the power -½."""
    factors = {
        EMBEDDINGS: float(dense["embedding_multiplier"]),
        HEAD: 1 / dense["logits_scaling"],
        ".self_attn.q_proj.weight": dense["attention_multiplier"] * dense["head_dim"] ** 0.5,
        ".self_attn.o_proj.weight": float(dense["residual_multiplier"]),
        ".mlp.down_proj.weight": float(dense["residual_multiplier"]),
    }
    return absorbed(own_head(tensors), factors)


def _gemma_tensors(dense: Config, tensors: Tensors) -> Tensors:
    """Write 1 + w for norms, and embeddings times √hidden beside a head without."""
    scaled = absorbed(own_head(tensors), {EMBEDDINGS: _gemma.scale(dense)})
    return one_plus_norms(scaled)


def _arcee_refuse(dense: Config) -> str:
    if dense["hidden_act"] != "relu2":
        return f"only relu2 becomes a gated MLP, this model has {dense['hidden_act']} (hidden_act)"
    return ""


_ACCEPTS = {
    "llama": Accept(),
    "mistral": Accept(),
    "internlm3": Accept(refuse=internlm3_refuse),
    "iquestcoder": Accept(),
    "phi3": Accept(config=_phi3, tensors=unfused, note=phi3_note),
    "helium": Accept(tensors=rotated_in_halves()),
    "ministral": Accept(refuse=_ministral_refuse),
    "ministral3": Accept(refuse=_ministral3_refuse, config=_ministral3, note=_ministral3_note),
    "ernie4_5": Accept(1, config=_ernie, tensors=rotated_in_halves()),
    "granite": Accept(
        2,
        tensors=_granite,
        note=f"the multipliers of Granite are part of its weights; {ROUNDING}",
    ),
    "gemma": Accept(
        refuse=_gemma.refuse,
        config=lambda dense: {**dense, "hidden_act": _gemma.activation(dense)},
        tensors=_gemma_tensors,
        note=f"norms and embeddings are written as they are used; {ROUNDING}",
    ),
    "arcee": Accept(
        refuse=_arcee_refuse,
        config=lambda dense: {**dense, "hidden_act": "relu"},
        tensors=squared_relu_as_gated,
        note="every MLP is half as large again: relu(z)² is relu(z)·z, with z made twice",
    ),
}


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    accepts=_ACCEPTS,
    router="model.layers.{layer}.block_sparse_moe.gate.weight",
    experts={
        f"{_EXPERT}.w1.weight": ("gate_proj.weight",),
        f"{_EXPERT}.w2.weight": ("down_proj.weight",),
        f"{_EXPERT}.w3.weight": ("up_proj.weight",),
    },
    config=config,
    refuse=refuse,
    exotic=silu_only("Mixtral"),
)

"""deepseek_v3: the home of dense models with latent attention, youtu and minicpm3.

Its router scores by sigmoid. Rotary dimensions are made neighbours: others know no other way.
"""

from __future__ import annotations

import re

from moeforge.configs import Config
from moeforge.dense import EMBEDDINGS, HEAD
from moeforge.families import (
    Accept,
    Family,
    Mixture,
    Tensors,
    silu_only,
)
from moeforge.families import _deepseek as deepseek
from moeforge.families._absorb import ROUNDING, absorbed, own_head
from moeforge.families._rope import first_context
from moeforge.families._sparse import leading_dense
from moeforge.families._transforms import interleaved
from moeforge.plans import PlannedTensor

_NOTE = f"scale_emb, scale_depth and dim_model_base are part of the weights; {ROUNDING}"
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_LATENT = ("kv_a_proj_with_mqa.weight", "kv_a_layernorm.weight", "kv_b_proj.weight")
_LOW_RANK = ("q_a_proj.weight", "q_a_layernorm.weight", "q_b_proj.weight")
_BIASES = tuple(f"self_attn.{part}.bias" for part in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj"))
_QUERY = re.compile(r"\.self_attn\.(q_proj|q_b_proj)\.weight$")
_KEY = re.compile(r"\.self_attn\.kv_a_proj_with_mqa\.(weight|bias)$")


def _rotated_in_neighbours(config: Config, tensors: Tensors) -> Tensors:
    """Permute rotary rows unless they are neighbours already."""
    if config.get("rope_interleave"):
        return tensors
    rotated = config["qk_rope_head_dim"]

    def turned(name: str, tensor: PlannedTensor) -> PlannedTensor:
        if _QUERY.search(name):
            return interleaved(tensor, config["qk_nope_head_dim"] + rotated, rotated)
        if _KEY.search(name):  # one key for all heads, below the latent
            return interleaved(tensor, config["kv_lora_rank"] + rotated, rotated)
        return tensor

    return {name: turned(name, tensor) for name, tensor in tensors.items()}


def _minicpm3(config: Config, tensors: Tensors) -> Tensors:
    """Multiply minicpm3's three scalars into the weights; its head no longer is its embeddings.

    Source: MiniCPM3DecoderLayer and MiniCPM3ForCausalLM of transformers.
    """
    depth = config["num_hidden_layers"]
    branch = (config["scale_depth"] or depth**0.5) / depth**0.5
    factors = {
        EMBEDDINGS: float(config["scale_emb"]),
        HEAD: (config["dim_model_base"] or config["hidden_size"]) / config["hidden_size"],
        ".self_attn.o_proj.weight": branch,
        ".self_attn.o_proj.bias": branch,
        ".mlp.down_proj.weight": branch,
    }
    return _rotated_in_neighbours(config, absorbed(own_head(tensors), factors))


def _words(config: Config) -> Config:
    """Write out what transformers 4 takes as it stands: `head_dim` is the rotated part."""
    values = config.get("v_head_dim") or config["hidden_size"] // config["num_attention_heads"]
    sizes = {"head_dim": config["qk_rope_head_dim"], "v_head_dim": values}
    return {**first_context(config), **sizes}


def refuse(dense: Config, mixture: Mixture) -> str:
    """No bias in the experts; the router needs two experts."""
    if dense["mlp_bias"]:
        return "DeepSeek-V3's experts have no biases, this model's MLPs have (mlp_bias is true)"
    return deepseek.too_few(mixture)


def config(dense: Config, mixture: Mixture) -> Config:
    """Write DeepSeek-V3's keys."""
    return {
        **deepseek.block(mixture),
        "rope_interleave": True,
        "qk_head_dim": None,
        "embedding_initializer_range": None,
        "mlp_bias": None,
        "scale_emb": None,
        "scale_depth": None,
        "dim_model_base": None,
    }


def _layer(config: Config, layer: int) -> tuple[str, ...]:
    query = ("q_proj.weight",) if config["q_lora_rank"] is None else _LOW_RANK
    attention = (*query, *_LATENT, "o_proj.weight")
    return (*_NORMS, *(f"self_attn.{name}" for name in attention))


FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    accepts={
        "youtu": Accept(config=_words, tensors=_rotated_in_neighbours),
        "minicpm3": Accept(config=_words, tensors=_minicpm3, note=_NOTE),
    },
    router=deepseek.ROUTER,
    experts=deepseek.EXPERTS,
    config=config,
    refuse=refuse,
    exotic=silu_only("DeepSeek-V3"),
    layer=_layer,
    optional=_BIASES,
    sparse_fills=deepseek.FILLS,
    dense_mlp=deepseek.DENSE_MLP,
    sparse=leading_dense,
    shared=deepseek.SHARED,
    score="sigmoid",
    selection_bias=deepseek.BIAS,
)

"""dbrx: the home of olmo models, whose norms have no weights and whose projections are clipped.

Its experts are matrices one below the other, its norms get weights of ones, and it has no tied
embeddings: a tied model's are written twice.
"""

from __future__ import annotations

from moeforge.configs import Config
from moeforge.dense import EMBEDDINGS, HEAD, NORM
from moeforge.families import Accept, Family, Fill, Mixture, Tensors, silu_only
from moeforge.families._transforms import constant, fused, renamed
from moeforge.plans import PlannedTensor

_BLOCK = "transformer.blocks.{layer}"
_NO_CLIP = 65504.0
"""Stands for no clip_qkv, which the family must have: the largest number that every dtype holds."""
_OUTSIDE = {EMBEDDINGS: "transformer.wte.weight", NORM: "transformer.norm_f.weight"}
_ATTENTION = {"self_attn.Wqkv.": "attn.Wqkv.", "self_attn.o_proj.": "attn.out_proj."}
_LLAMAS = (
    "attention_bias attention_dropout clip_qkv head_dim hidden_act hidden_size intermediate_size"
    " max_position_embeddings mlp_bias num_attention_heads num_hidden_layers num_key_value_heads"
    " pretraining_tp"
)
"""What DBRX says in other words, or not at all."""


def refuse(dense: Config) -> str:
    """No biases, and the head size is always hidden / heads."""
    if dense["attention_bias"]:
        return "DBRX has no biases, this model's attention has (attention_bias is true)"
    if dense["head_dim"] * dense["num_attention_heads"] != dense["hidden_size"]:
        return f"DBRX needs head_dim = hidden / heads, this model has {dense['head_dim']}"
    return ""


def exotic(dense: Config) -> str:
    """Other engines do not look at rotary scaling."""
    rope = dense.get("rope_parameters") or dense.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        return f"other engines compute DBRX without rotary scaling, this model has {kind}"
    return ""


def tensors(dense: Config, own: Tensors) -> Tensors:
    """Fuse queries, keys and values, untie the head, and give the last norm its weight."""
    result: dict[str, PlannedTensor] = {}
    for name, tensor in own.items():
        stem, _, part = name.rpartition("self_attn.")
        if part == "q_proj.weight":
            parts = [own[f"{stem}self_attn.{p}_proj.weight"] for p in "qkv"]
            name = f"{stem}self_attn.Wqkv.weight"
            result[name] = fused(name, parts)
        elif part not in ("k_proj.weight", "v_proj.weight"):
            result[name] = tensor
    if EMBEDDINGS in own:
        result.setdefault(HEAD, renamed(own[EMBEDDINGS], HEAD))
        spec = own[EMBEDDINGS].spec
        result[NORM] = constant(NORM, 1.0, spec, spec.shape[1:])
    return result


def config(dense: Config, mixture: Mixture) -> Config:
    """Write DBRX's keys, most of them in two groups."""
    clip = dense.get("clip_qkv")
    rope = dense.get("rope_parameters") or dense
    return {
        **dict.fromkeys(_LLAMAS.split()),
        "d_model": dense["hidden_size"],
        "n_heads": dense["num_attention_heads"],
        "n_layers": dense["num_hidden_layers"],
        "max_seq_len": dense["max_position_embeddings"],
        "output_router_logits": False,
        "attn_config": {
            "clip_qkv": _NO_CLIP if clip is None else float(clip),
            "kv_n_heads": dense["num_key_value_heads"],
            "rope_theta": float(rope["rope_theta"]),
        },
        "ffn_config": {
            "ffn_act_fn": {"name": dense["hidden_act"]},
            "ffn_hidden_size": mixture.width,
            "moe_num_experts": mixture.experts,
            "moe_top_k": mixture.per_token,
            "moe_jitter_eps": None,
            "moe_normalize_expert_weights": 1.0,
        },
    }


def _on_disk(name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    name = name.replace("model.layers.", "transformer.blocks.")
    for llama, dbrx in _ATTENTION.items():
        name = name.replace(llama, f"norm_attn_norm.{dbrx}")
    return name


def _ones(dense: Config, mixture: Mixture) -> tuple[int, ...]:
    return (dense["hidden_size"],)


FAMILY = Family(
    model_type="dbrx",
    architecture="DbrxForCausalLM",
    accepts={"olmo": Accept(refuse=refuse, tensors=tensors, exotic=exotic)},
    router=f"{_BLOCK}.ffn.router.layer.weight",
    experts={
        f"{_BLOCK}.ffn.experts.mlp.w1": ("gate_proj.weight",),
        f"{_BLOCK}.ffn.experts.mlp.v1": ("up_proj.weight",),
        f"{_BLOCK}.ffn.experts.mlp.w2": ("down_proj.weight",),
    },
    config=config,
    exotic=silu_only("DBRX"),
    layer=lambda config, layer: ("self_attn.Wqkv.weight", "self_attn.o_proj.weight"),
    fills={f"{_BLOCK}.norm_attn_norm.norm_{n}.weight": Fill(_ones, 1.0) for n in (1, 2)},
    outside=(EMBEDDINGS, NORM, HEAD),
    outside_optional=(),
    rename=_on_disk,
    flat=True,
)

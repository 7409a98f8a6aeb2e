"""lfm2_moe: the home of lfm2 models, whose layers are short convolutions and attention."""

from __future__ import annotations

from moeforge.configs import Config
from moeforge.dense import EMBEDDINGS
from moeforge.families import Accept, Family, Fill, Mixture, Tensors
from moeforge.families._sparse import leading_dense
from moeforge.families._transforms import renamed

_LAYER = "model.layers.{layer}"
_BIAS = f"{_LAYER}.feed_forward.expert_bias"
_NAMES = {"w1.": "gate_proj.", "w2.": "down_proj.", "w3.": "up_proj."}
_NORMS = ("operator_norm.weight", "ffn_norm.weight")
_CONVOLUTION = tuple(f"conv.{part}.weight" for part in ("conv", "in_proj", "out_proj"))
_ATTENTION = tuple(
    f"self_attn.{part}.weight"
    for part in ("q_proj", "k_proj", "v_proj", "out_proj", "q_layernorm", "k_layernorm")
)
_NOTE = (
    "lfm2_moe weighs experts by sigmoids and divides by their sum plus 1e-6: where those of all "
    "chosen experts are tiny, the MLP's output shrinks; router logits above -5 keep it within 1e-4"
)


def words(dense: Config) -> Config:
    """Write out what lfm2 derives: the width of its MLPs, and which layers are convolutions.

    The dense model takes two thirds of the width that its config says, rounded up to blocks.
    """
    width = dense.get("block_ff_dim") or dense.get("intermediate_size")
    if isinstance(width, int) and dense.get("block_auto_adjust_ff_dim", True):
        width = int(2 * width / 3)
        if (factor := dense.get("block_ffn_dim_multiplier", 1.0)) is not None:
            block = dense.get("block_multiple_of", 256)
            width = -(-int(factor * width) // block) * block
    depth = range(dense["num_hidden_layers"])
    attention = dense.get("full_attn_idxs")
    kinds = dense.get("layer_types") or [
        "full_attention" if attention is None or layer in attention else "conv" for layer in depth
    ]
    return {**dense, "intermediate_size": width, "layer_types": kinds}


def tensors(dense: Config, own: Tensors) -> Tensors:
    """Call the MLPs' tensors as llama does."""
    result = {}
    for name, tensor in own.items():
        stem, found, part = name.partition(".feed_forward.")
        if found:
            name = f"{stem}.mlp.{_NAMES.get(part[:3], part[:3])}{part[3:]}"
        result[name] = renamed(tensor, name)
    return result


def layer(dense: Config, index: int) -> tuple[str, ...]:
    """Return what a layer has beside its MLP."""
    attends = dense["layer_types"][index] == "full_attention"
    return (*_NORMS, *(_ATTENTION if attends else _CONVOLUTION))


def config(dense: Config, mixture: Mixture) -> Config:
    """Write LFM2-MoE's keys; `intermediate_size` is that of layers without experts."""
    return {
        "num_experts": mixture.experts,
        "num_experts_per_tok": mixture.per_token,
        "moe_intermediate_size": mixture.width,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "use_expert_bias": True,
        "output_router_logits": False,
        **dict.fromkeys(key for key in dense if key.startswith("block_")),
        "attention_bias": None,
        "full_attn_idxs": None,
        "hidden_act": None,
        "mlp_bias": None,
        "tie_embedding": None,
    }


def sparse(dense: Config, mixture: Mixture) -> Config | str:
    """Dense MLPs come first."""
    said = leading_dense(dense, mixture)
    return said if isinstance(said, str) else {"num_dense_layers": said["first_k_dense_replace"]}


FAMILY = Family(
    model_type="lfm2_moe",
    architecture="Lfm2MoeForCausalLM",
    accepts={"lfm2": Accept(config=words, tensors=tensors, note=_NOTE)},
    router=f"{_LAYER}.feed_forward.gate.weight",
    experts={
        f"{_LAYER}.feed_forward.experts.{{expert}}.w1.weight": ("gate_proj.weight",),
        f"{_LAYER}.feed_forward.experts.{{expert}}.w2.weight": ("down_proj.weight",),
        f"{_LAYER}.feed_forward.experts.{{expert}}.w3.weight": ("up_proj.weight",),
    },
    config=config,
    layer=layer,
    optional=tuple(f"conv.{part}.bias" for part in ("conv", "in_proj", "out_proj")),
    outside=(EMBEDDINGS, "model.embedding_norm.weight"),
    sparse_fills={_BIAS: Fill(lambda config, mixture: (mixture.experts,), dtype="float32")},
    dense_mlp={
        f"{_LAYER}.feed_forward.w1.weight": ("gate_proj.weight",),
        f"{_LAYER}.feed_forward.w2.weight": ("down_proj.weight",),
        f"{_LAYER}.feed_forward.w3.weight": ("up_proj.weight",),
    },
    sparse=sparse,
    score="sigmoid",
    selection_bias=_BIAS,
)

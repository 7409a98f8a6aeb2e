"""Owns Granite's words: llama with four multipliers, and biases on all four projections or on none.

granitemoe, granitemoeshared, granitemoehybrid and granitemoe_swa speak them. Knows no layer types.
"""

from __future__ import annotations

from dataclasses import replace

from moeforge.configs import Config
from moeforge.families import (
    Accept,
    Fill,
    Mixture,
    Shape,
    Shared,
    Tensors,
    _gemma,
    silu_only,
)
from moeforge.families._absorb import ROUNDING, one_plus_norms
from moeforge.families._llama import internlm3_refuse
from moeforge.families._windows import windows

LAYER = "model.layers.{layer}"
ROUTER = f"{LAYER}.block_sparse_moe.router.layer.weight"
EXPERTS = {
    f"{LAYER}.block_sparse_moe.input_linear.weight": ("gate_proj.weight", "up_proj.weight"),
    f"{LAYER}.block_sparse_moe.output_linear.weight": ("down_proj.weight",),
}
SHARED = Shared(
    {
        f"{LAYER}.shared_mlp.input_linear.weight": ("gate_proj.weight", "up_proj.weight"),
        f"{LAYER}.shared_mlp.output_linear.weight": ("down_proj.weight",),
    }
)


def own(config: Config) -> Config:
    """Return the config of a Granite with its multipliers as floats."""
    names = ("embedding_multiplier", "logits_scaling", "residual_multiplier")
    return {**config, **{key: float(config[key]) for key in (*names, "attention_multiplier")}}


def neutral(config: Config) -> Config:
    """Return the config of a llama-like model with multipliers that change nothing."""
    return {
        **config,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": config["head_dim"] ** -0.5,
    }


def config(dense: Config, mixture: Mixture) -> Config:
    """Write what all Granite mixtures have in common; the multipliers are there already."""
    return {
        "intermediate_size": mixture.width,
        "num_local_experts": mixture.experts,
        "num_experts_per_tok": mixture.per_token,
        "output_router_logits": False,
        "mlp_bias": None,
        "pretraining_tp": None,
    }


def refuse(dense: Config, mixture: Mixture) -> str:
    """Granite's experts have no biases."""
    if dense["mlp_bias"]:
        return "Granite's experts have no biases, this model's MLPs have (mlp_bias is true)"
    return ""


activation = silu_only("it")


def exotic(dense: Config, mixture: Mixture) -> str:
    """Other engines do not look at the activation, and vLLM not at attention biases."""
    if dense["attention_bias"] and not activation(dense, mixture):
        return "vLLM leaves the attention biases of this architecture out without a word"
    return activation(dense, mixture)


def _bias(heads: str) -> Shape:
    def shape(dense: Config, mixture: Mixture) -> tuple[int, ...]:
        # No such tensor is written where the family is told that there are no biases.
        return (dense[heads] * dense["head_dim"],) if dense["attention_bias"] else ()

    return shape


def _hidden(dense: Config, mixture: Mixture) -> tuple[int, ...]:
    return (dense["hidden_size"],) if dense["attention_bias"] else ()


BIASES = {
    f"{LAYER}.self_attn.q_proj.bias": Fill(_bias("num_attention_heads")),
    f"{LAYER}.self_attn.k_proj.bias": Fill(_bias("num_key_value_heads")),
    f"{LAYER}.self_attn.v_proj.bias": Fill(_bias("num_key_value_heads")),
    f"{LAYER}.self_attn.o_proj.bias": Fill(_hidden),
}
"""Zeros for what a model with biases on some projections lacks."""


def _no_window(config: Config) -> str:
    window = windows(config)[1]
    if window is not None:
        return f"Granite mixtures have no sliding attention (sliding_window is {window})"
    return ""


def _qwen2(config: Config) -> Config:
    return {**neutral(config), "attention_bias": True}


def _seed_oss(config: Config) -> Config:
    biased = bool(config["attention_bias"] or config["attention_out_bias"])
    return {**neutral(config), "attention_bias": biased}


def _hyperclovax(config: Config) -> Config:
    # It multiplies its logits by what Granite divides them by.
    given = config["attention_multiplier"]
    scaled = {
        "logits_scaling": 1 / config["logits_scaling"],
        "attention_multiplier": config["head_dim"] ** -0.5 if given is None else given,
    }
    return own({**config, **scaled})


def _hyperclovax_refuse(config: Config) -> str:
    if config["use_post_norm"]:
        return "Granite mixtures have no norms after attention and MLP (use_post_norm is true)"
    return ""


def _gemma_words(config: Config) -> Config:
    own_words = {
        "hidden_act": _gemma.activation(config),
        "embedding_multiplier": _gemma.scale(config),
    }
    return {**neutral(config), **own_words}


def _gemma_tensors(config: Config, tensors: Tensors) -> Tensors:
    return one_plus_norms(tensors)


_NEEDLESS = ("attention_out_bias", "bias", "hidden_activation", "qkv_bias", "use_post_norm")
_WINDOWS = ("layer_types", "max_window_layers", "sliding_window", "use_sliding_window")
REMOVED: Config = dict.fromkeys((*_NEEDLESS, *_WINDOWS))
"""Keys of dense models that a Granite mixture without windows has no use for."""


def _head_note(config: Config) -> str:
    width = config["hidden_size"] / config["num_attention_heads"]
    if config["head_dim"] == width:
        return ""
    return (
        f"head_dim is {config['head_dim']}, hidden_size / num_attention_heads is {width:g}: "
        "transformers before version 5 and vLLM do not load such a Granite mixture"
    )


def _gemma_note(config: Config) -> str:
    norms = f"1 is added to the weights of all norms; {ROUNDING}"
    return "; ".join(filter(None, (norms, _head_note(config))))


_ACCEPTS = {
    "granite": Accept(config=own),
    "hyperclovax": Accept(config=_hyperclovax, refuse=_hyperclovax_refuse),
    "llama": Accept(1, config=neutral),
    "internlm3": Accept(1, config=neutral, refuse=internlm3_refuse),
    "iquestcoder": Accept(1, config=neutral),
    "mistral": Accept(1, config=neutral, refuse=_no_window),
    "qwen2": Accept(1, config=_qwen2, refuse=_no_window),
    "seed_oss": Accept(1, config=_seed_oss),
    "gemma": Accept(
        1, config=_gemma_words, tensors=_gemma_tensors, refuse=_gemma.refuse, note=_gemma_note
    ),
}


def accepts(later: int = 0) -> dict[str, Accept]:
    """Return the dense types that are a Granite with other words, each `later` in rank."""
    return {
        kind: replace(accept, rank=accept.rank + later, note=accept.note or _head_note)
        for kind, accept in _ACCEPTS.items()
    }

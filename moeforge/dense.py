"""Owns what is known of dense model types: what their configs leave unsaid, where their parts lie.

Knows names and numbers only; no tensor, no MoE family, and does not import transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

from moeforge.configs import Config, n_layers

EMBEDDINGS, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a dense model lie, by the names of its modules in transformers.

    Attributes:
        layers: what stands before the layer number.
        mlp: module of a layer that experts replace; its input is what a router sees.
        embeddings: the embedding matrix [vocabulary, hidden].
    """

    layers: str = "model.layers."
    mlp: str = "mlp"
    embeddings: str = EMBEDDINGS


_GPT2 = Anatomy("transformer.h.", "mlp", "transformer.wte.weight")

ANATOMY: dict[str, Anatomy] = {
    "bamba": Anatomy(mlp="feed_forward"),
    "biogpt": Anatomy("biogpt.layers.", "fc1", "biogpt.embed_tokens.weight"),
    "bloom": Anatomy("transformer.h.", "mlp", "transformer.word_embeddings.weight"),
    "codegen": _GPT2,
    "cpmant": Anatomy("cpmant.encoder.layers.", "ffn.ffn", "cpmant.input_embedding.weight"),
    "ctrl": Anatomy("transformer.h.", "ffn", "transformer.w.weight"),
    "falcon": Anatomy("transformer.h.", "mlp", "transformer.word_embeddings.weight"),
    "falcon_h1": Anatomy(mlp="feed_forward"),
    "gpt-sw3": _GPT2,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": _GPT2,
    "gpt_neox": Anatomy("gpt_neox.layers.", "mlp", "gpt_neox.embed_in.weight"),
    "gpt_neox_japanese": Anatomy(
        "gpt_neox_japanese.layers.", "mlp", "gpt_neox_japanese.embed_in.weight"
    ),
    "gptj": _GPT2,
    "granitemoehybrid": Anatomy(mlp="shared_mlp"),
    "lfm2": Anatomy(mlp="feed_forward"),
    "lfm3": Anatomy(mlp="feed_forward"),
    "modernbert-decoder": Anatomy(embeddings="model.embeddings.tok_embeddings.weight"),
    "mpt": Anatomy("transformer.blocks.", "ffn", "transformer.wte.weight"),
    "openai-gpt": Anatomy("transformer.h.", "mlp", "transformer.tokens_embed.weight"),
    "opt": Anatomy("model.decoder.layers.", "fc1", "model.decoder.embed_tokens.weight"),
    "recurrent_gemma": Anatomy(mlp="mlp_block"),
    "xglm": Anatomy(mlp="fc1"),
    "xlstm": Anatomy("backbone.blocks.", "ffn", "backbone.embeddings.weight"),
}
"""Dense types that are not laid out as llama is."""


def anatomy(config: Config) -> Anatomy:
    """Return where the parts of the model with this config lie."""
    return ANATOMY.get(str(config.get("model_type")), Anatomy())


DEFAULTS: dict[str, Config] = {
    "arcee": {
        "hidden_act": "relu2",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "ernie4_5": {
        "pad_token_id": 0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "use_bias": False,
    },
    "gemma": {
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "hidden_act": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 8192,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "tie_word_embeddings": True,
    },
    "granite_swa": {
        "bos_token_id": 100257,
        "eos_token_id": 100257,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
    },
    "granitemoehybrid": {
        "num_local_experts": 8,
        "shared_intermediate_size": 1024,
        "layer_types": None,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
    },
    "helium": {
        "pad_token_id": 3,
        "rms_norm_eps": 1e-8,
        "max_position_embeddings": 4096,
        "num_key_value_heads": 20,
        "head_dim": 128,
        "rope_theta": 100000.0,
    },
    "hyperclovax": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": None,
        "use_post_norm": True,
    },
    "internlm3": {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "pad_token_id": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "iquestcoder": {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "ministral3": {
        "pad_token_id": 11,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 262144,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "seed_oss": {
        "pad_token_id": 1,
        "bos_token_id": 0,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 524288,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
        "attention_out_bias": False,
    },
    "smollm3": {
        "pad_token_id": 128004,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    },
    "llama": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mistral": {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "granite": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
    },
    "cohere": {"rope_theta": 500000.0, "tie_word_embeddings": True, "use_qk_norm": False},
    "cohere2": {"tie_word_embeddings": True, "sliding_window": 4096},
    "gemma4_text": {
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "enable_moe_block": False,
        "num_kv_shared_layers": 0,
        "attention_k_eq_v": False,
        "hidden_size_per_layer_input": 256,
    },
    "lfm2": {"rope_theta": 1000000.0, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "olmo": {
        "max_position_embeddings": 2048,
        "pad_token_id": 1,
        "eos_token_id": 50279,
    },
    "olmo2": {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "pad_token_id": 1,
        "eos_token_id": 50279,
    },
    "cwm": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "rms_norm_eps": 1e-5,
        "sliding_window": 8192,
        "rope_theta": 1000000.0,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "glm": {
        "rms_norm_eps": 1.5625e-07,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "pad_token_id": 151329,
        "eos_token_id": [151329, 151336, 151338],
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
    },
    "hunyuan_v1_dense": {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
    "minicpm3": {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 40,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
        "kv_lora_rank": 256,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 256,
    },
    "ministral": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sliding_window": 4096,
    },
    "phi3": {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
    },
    "qwen3_5_text": {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "partial_rotary_factor": 0.25,
    },
    "youtu": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 16,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "tie_word_embeddings": True,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_interleave": True,
    },
}
"""What a key means that config.json leaves out, where the MoE family's default differs."""

_COMMON: Config = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}


def complete(config: Config) -> Config:
    """Return `config` with the defaults of its dense type written out.

    Raises:
        ValueError: it does not say how wide and deep the model is, or how many heads it has.
    """
    own = DEFAULTS.get(str(config.get("model_type")), {})
    full = {**_COMMON, **own, **config}
    if "rope_parameters" in own and not config.get("rope_parameters"):
        # `rope_scaling` is the older name of the same.
        full["rope_parameters"] = None if config.get("rope_scaling") else own["rope_parameters"]
    sizes = ("hidden_size", "num_attention_heads")
    absent = [key for key in sizes if not isinstance(full.get(key), int) or not full[key]]
    if absent := absent + ([] if n_layers(full) else ["num_hidden_layers"]):
        raise ValueError(f"config.json does not say {', '.join(absent)}")
    heads = full["num_attention_heads"]
    full["num_key_value_heads"] = full.get("num_key_value_heads") or heads
    full["head_dim"] = full.get("head_dim") or full["hidden_size"] // heads
    return full


_HIDDEN = ("hidden_size", "n_embd", "d_model", "n_embed", "dim", "embed_dim")


WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "dim_ff", "dff")
"""Keys of configs for the width of MLPs."""


def mlp_width(config: Config) -> int:
    """Return the intermediate size of the MLPs, the widest where layers differ."""
    for key in WIDTHS:
        value = config.get(key)
        if isinstance(value, list) and value:
            return int(max(value))
        if isinstance(value, int):
            return value
    return 4 * (hidden_size(config) or 0)


def hidden_size(config: Config) -> int | None:
    """Return the width of the residual stream, or None where the config does not say."""
    return next((config[key] for key in _HIDDEN if isinstance(config.get(key), int)), None)


_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


def max_positions(config: Config) -> int | None:
    """Return how many tokens the model takes, or None where the config does not say."""
    return next((config[key] for key in _POSITIONS if isinstance(config.get(key), int)), None)

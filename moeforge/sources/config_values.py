"""Owns what values config.json may have: types and bounds of the keys that are computed with.

Whoever reads a config behind this door may count on them. Knows keys; knows no family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moeforge.configs import n_layers
from moeforge.errors import Finding, SourceError

MOST_LAYERS = 10_000
MOST_WIDTH = 10_000_000
"""Beyond any model; lists of so many entries still fit into memory."""
_MOST = 1e30


def _is_int(value: Any, least: int = 0, most: int = MOST_WIDTH) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= _MOST  # which is false of NaN, and of infinity


def _is_list(value: Any, each: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(each, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_rotary(value: Any, nested: bool = True) -> bool:
    """Say whether `value` holds rotary parameters, for all layers or for each kind of layer."""
    if not isinstance(value, dict):
        return False
    if nested and value and all(isinstance(each, dict) or each is None for each in value.values()):
        return all(each is None or _is_rotary(each, nested=False) for each in value.values())
    texts = all(_is_text(value.get(key, "")) or value[key] is None for key in ("rope_type", "type"))
    numbers = [value.get(key) for key in ("rope_theta", "factor", "partial_rotary_factor")]
    return texts and all(number is None or _is_number(number) for number in numbers)


Kind = tuple[str, Callable[[Any], bool]]
_LAYERS: Kind = (
    f"a number of layers, at most {MOST_LAYERS}",
    # A mapping says it for each part of a model of several.
    lambda value: _is_int(value, most=MOST_LAYERS) or isinstance(value, dict),
)
_COUNT: Kind = (f"a whole number from 0 to {MOST_WIDTH}", _is_int)
_COUNTS: Kind = (
    f"a whole number from 0 to {MOST_WIDTH}, or a list of such",
    lambda value: _is_int(value) or (bool(value) and _is_list(value, _is_int)),
)
# Windows stand for "all of it" with numbers beyond any context.
_WINDOW: Kind = ("a whole number from 0 to 2^62", lambda value: _is_int(value, most=2**62))
_STEP: Kind = ("a whole number above zero", lambda value: _is_int(value, 1))
_INDEX: Kind = ("a whole number", lambda value: _is_int(value, -1))
_NUMBER: Kind = ("a number", _is_number)
_NUMBERS: Kind = (
    "a number, or a list of such",
    lambda value: _is_number(value) or _is_list(value, _is_number),
)
_TEXT: Kind = ("a text", _is_text)
_BUILT_IN: Kind = (
    "one that comes with transformers",
    lambda value: "/" not in str(value),
)
_TEXTS: Kind = ("a list of texts", lambda value: _is_list(value, _is_text))
_PATTERN: Kind = ("a text", lambda value: _is_text(value) or _is_list(value, _is_text))
_PLACES: Kind = (
    "a list of layer numbers",
    lambda value: _is_list(value, lambda each: _is_int(each, -1)),
)
_TOKEN: Kind = (
    "a token id, or a list of such",
    lambda value: _is_int(value, -(2**31), 2**31) or _is_list(value, lambda v: _is_int(v, -1)),
)
_MAPPING: Kind = ("a mapping", lambda value: isinstance(value, dict))
_NUMBERED: Kind = (
    "a mapping from layer numbers",
    lambda value: isinstance(value, dict) and all(str(key).isdecimal() for key in value),
)
_RUNS: Kind = (
    "a list of [list of kinds, how often]",
    lambda value: _is_list(
        value,
        lambda run: (
            isinstance(run, list)
            and len(run) == 2
            and _is_list(run[0], _is_text)
            and _is_int(run[1], most=MOST_LAYERS)
        ),
    ),
)
_ROTARY: Kind = ("rotary parameters", _is_rotary)

_REQUIRED: dict[str, Kind] = {
    **dict.fromkeys(("embedding_multiplier", "logits_scaling", "residual_multiplier"), _NUMBER),
    **dict.fromkeys(("scale_emb", "block_ffn_dim_multiplier"), _NUMBER),
    **dict.fromkeys(("num_kv_shared_layers", "block_multiple_of"), _COUNT),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank"), _COUNT),
}
"""What a key must be where it is written; null is not one of them."""

_OPTIONAL: dict[str, Kind] = {
    # A slash in it is a repository of the Hub whose code transformers would run.
    **dict.fromkeys(("attn_implementation", "_attn_implementation"), _BUILT_IN),
    **dict.fromkeys(("experts_implementation", "_experts_implementation"), _BUILT_IN),
    "model_type": ("a word", lambda value: _is_text(value) and value != ""),
    "rope_theta": _NUMBERS,
    "sliding_window": _WINDOW,
    "num_hidden_layers": _LAYERS,
    **dict.fromkeys(("n_layer", "n_layers", "num_layers", "depth"), _COUNTS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "n_embed", "num_attention_heads"), _COUNT),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "vocab_size", "v_head_dim"), _COUNT),
    **dict.fromkeys(("hidden_size_per_layer_input", "q_lora_rank", "dim_model_base"), _COUNT),
    **dict.fromkeys(("max_window_layers", "num_dense_layers"), _COUNT),
    **dict.fromkeys(("first_k_dense_replace", "num_hash_layers", "dense_mlp_idx"), _COUNT),
    **dict.fromkeys(("moe_layer_start_index", "moe_layer_end_index"), _INDEX),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset"), _COUNT),
    **dict.fromkeys(("attn_layer_period", "expert_layer_period", "moe_layer_interval"), _STEP),
    **dict.fromkeys(("decoder_sparse_step", "no_rope_layer_interval"), _COUNT),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), _COUNTS),
    **dict.fromkeys(("dim_ff", "dff", "dim", "embed_dim", "block_ff_dim"), _COUNTS),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon"), _NUMBER),
    **dict.fromkeys(("attention_multiplier", "scale_depth", "logit_scale"), _NUMBER),
    **dict.fromkeys(("partial_rotary_factor",), _NUMBER),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), _ROTARY),
    **dict.fromkeys(("hidden_act", "dtype", "torch_dtype"), _TEXT),
    **dict.fromkeys(("hidden_activation", "activation_function"), _TEXT),
    **dict.fromkeys(("architectures", "layer_types", "layers_block_type", "block_types"), _TEXTS),
    **dict.fromkeys(("indexer_types", "mlp_layer_types"), _TEXTS),
    **dict.fromkeys(("hybrid_override_pattern", "index_topk_pattern"), _PATTERN),
    **dict.fromkeys(("mlp_only_layers", "attn_layer_indices", "full_attn_idxs"), _PLACES),
    **dict.fromkeys(("moe_layers", "local_layer_ids", "fullatt_block_indexes"), _PLACES),
    **dict.fromkeys(("cross_attention_layers", "ple_layer_ids", "no_rope_layers"), _PLACES),
    "deepstack_visual_indexes": _PLACES,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _TOKEN),
    **dict.fromkeys(("auto_map", "linear_attn_config"), _MAPPING),
    "attention_types": _RUNS,
    "per_layer_config": _NUMBERED,
}
"""The same of keys that may also be null, which means that they are not there."""

_PER_LAYER = ("layer_types", "layers_block_type", "indexer_types", "mlp_layer_types")
_INNER = "text_config"


def check(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a config whose values cannot be computed with.

    Args:
        config: config.json.
        path: where it lies, for the message.

    Raises:
        SourceError: with every value that is impossible.
    """
    fix = "Download the model again, or correct its config."
    found = [
        Finding(f"{path} says {key}: {_short(value)}, not {wanted}", fix)
        for key, value, wanted in _odd(config)
    ]
    if found:
        raise SourceError(*found)


def _odd(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield key, value and what it should be of everything that is impossible."""
    wrong = list(_mistyped(config))
    for key, value, wanted in wrong or _too_short(config):
        yield prefix + key, value, wanted
    inner = config.get(_INNER)
    if isinstance(inner, dict) and not prefix:
        yield from _odd(inner, f"{_INNER}.")


def _mistyped(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    # Vision and audio models have stages, each with its own sizes.
    several = "hidden_sizes" in config or "depths" in config
    for key, value in config.items():
        wanted, fits = _REQUIRED.get(key) or _OPTIONAL.get(key) or ("", lambda value: True)
        if several and isinstance(value, list):
            wanted, fits = _COUNTS if _OPTIONAL.get(key) is _COUNT else (wanted, fits)
        if value is None and key not in _REQUIRED:
            continue
        if not fits(value):
            yield key, value, wanted


def _too_short(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    depth = n_layers(dict(config))
    for key in _PER_LAYER:
        listed = config.get(key)
        if listed is not None and depth and len(listed) < depth:
            yield key, listed, f"a list with an entry for each of {depth} layers"


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"

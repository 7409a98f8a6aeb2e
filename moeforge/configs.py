"""Owns facts and spellings of a raw config.json; knows no tensor and does not import transformers.

Outputs are written from the raw source config, not from transformers' own classes: version 5
writes only `rope_parameters` and `dtype`, which version 4 and other engines read past silently.
"""

from __future__ import annotations

import copy
from typing import Any

Config = dict[str, Any]

_LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth")


def layer_key(config: Config) -> str:
    """Return the key that holds the number of layers."""
    return next((key for key in _LAYER_KEYS if key in config), _LAYER_KEYS[0])


def n_layers(config: Config) -> int | None:
    """Return the number of layers, or None where the config does not say."""
    value = config.get(layer_key(config))
    if value is None:  # Nemotron-H has one entry per layer instead
        value = len(config.get("layers_block_type") or config.get("hybrid_override_pattern") or ())
    return value if isinstance(value, int) and value else None


def plain_floats(value: Any) -> Any:
    """Return a copy of a config with infinite numbers, which transformers 5 writes in words.

    That is {"__float__": "Infinity"}, for JSON has no such numbers.
    """
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: plain_floats(each) for key, each in value.items()}
    return [plain_floats(each) for each in value] if isinstance(value, list) else value


def rope(config: Config) -> Config | None:
    """Return the rotary parameters in the spelling of transformers 5, or None.

    None where the config has none, or has one set per layer type, which version 4 cannot express.
    """
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict):
        if any(isinstance(value, dict) for value in parameters.values()):
            return None
        merged = dict(parameters)
    else:
        scaling = config.get("rope_scaling")
        merged = dict(scaling) if isinstance(scaling, dict) else {}
    merged["rope_type"] = merged.get("rope_type") or merged.pop("type", None) or "default"
    merged.pop("type", None)
    theta = merged.get("rope_theta", config.get("rope_theta"))
    if not isinstance(theta, (int, float)):
        return None
    merged["rope_theta"] = float(theta)
    if "partial_rotary_factor" in config:
        merged.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    return merged


_ROTARY_PER_KIND = {
    *("beam", "cohere_compass_text", "dots3_note_text", "gemma3_text"),
    *("gemma3n_text", "gemma4_text", "gemma4_unified_text", "laguna"),
    *("lfm3", "mellum", "mimo_v2_flash", "modernbert-decoder"),
    *("olmo3", "zaya"),
}
"""Types that have rotary parameters for each kind of layer: transformers makes them of version 4's
keys, and takes one set under version 5's key for something else."""


def portable(config: Config, dtype: str | None = None) -> Config:
    """Return `config` so that transformers 4 and 5 and other engines read the same model.

    Args:
        config: raw config.json.
        dtype: dtype of the tensors; None leaves what the config says.

    Both spellings of rotary parameters and of the dtype are written; traces of the machine that
    the source was saved on are removed.
    """
    result = copy.deepcopy(config)
    for key in ("_name_or_path", "transformers_version"):
        result.pop(key, None)
    dtype = dtype or result.get("dtype") or result.get("torch_dtype")
    if dtype:
        result["torch_dtype"] = result["dtype"] = dtype
    parameters = rope(config)
    if parameters and config.get("model_type") not in _ROTARY_PER_KIND:
        result["rope_parameters"] = parameters
        result["rope_theta"] = parameters["rope_theta"]
        if "partial_rotary_factor" in parameters:
            result["partial_rotary_factor"] = parameters["partial_rotary_factor"]
        scaled = {k: v for k, v in parameters.items() if k != "rope_theta"}
        if parameters["rope_type"] != "default":
            # Old readers know the key "type" only.
            result["rope_scaling"] = {**scaled, "type": parameters["rope_type"]}
        else:
            result["rope_scaling"] = None  # mlx-lm asks some families for the key
    return result

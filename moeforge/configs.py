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
    return value if isinstance(value, int) else None


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
    if parameters:
        result["rope_parameters"] = parameters
        result["rope_theta"] = parameters["rope_theta"]
        if "partial_rotary_factor" in parameters:
            result["partial_rotary_factor"] = parameters["partial_rotary_factor"]
        scaled = {k: v for k, v in parameters.items() if k != "rope_theta"}
        if parameters["rope_type"] != "default":
            # Old readers know the key "type" only.
            result["rope_scaling"] = {**scaled, "type": parameters["rope_type"]}
        elif "rope_scaling" in result:
            result["rope_scaling"] = None
    return result


_NOT_PER_LAYER = {
    "architectures",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "begin_suppress_tokens",
    "suppress_tokens",
}
"""Lists that may be as long as the model is deep, and are not about its layers."""
_LAYER_INDICES = {"mlp_only_layers", "fullatt_block_indexes"}


class LayerFieldError(ValueError):
    """A field of the config speaks of each layer, and one of the stacked models lacks it."""


def restack(donor: Config, layers: list[tuple[Config, int]]) -> Config:
    """Return `donor` for a stack of `layers`.

    Args:
        donor: config that everything not per layer comes from.
        layers: for each output layer, the config of the model it comes from and its index there.

    Lists with one entry per layer (`layer_types`, ...) and lists of layer numbers
    (`mlp_only_layers`) follow the layers.

    Raises:
        LayerFieldError: a source of a layer does not have a per-layer list that the donor has.
    """
    result = copy.deepcopy(donor)
    result[layer_key(donor)] = len(layers)
    depth = n_layers(donor)
    for key, value in donor.items():
        if not isinstance(value, list) or key in _NOT_PER_LAYER:
            continue
        if key in _LAYER_INDICES:
            result[key] = [
                new for new, (config, old) in enumerate(layers) if old in config.get(key, [])
            ]
        elif len(value) == depth:
            for config, _ in layers:
                theirs = config.get(key)
                if not isinstance(theirs, list) or len(theirs) != n_layers(config):
                    raise LayerFieldError(
                        f'"{key}" has an entry for each layer, but not in all models'
                    )
            result[key] = [config[key][old] for config, old in layers]
    return result

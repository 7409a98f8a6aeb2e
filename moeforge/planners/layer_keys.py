"""Owns what keys of a raw config.json say of single layers, and how they say it of a stack.

Knows no tensor and does not import transformers: what a family derives from other keys is the
business of `layer_lists`, and whether all of it is enough, of `layer_proof`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moeforge.configs import Config, n_layers

_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth", "num_blocks")


class LayerFieldError(ValueError):
    """The config of the result cannot say what the stacked layers are."""


@dataclass(frozen=True)
class Origin:
    """The layer that a layer of the stack comes from.

    Attributes:
        label: how messages call its model.
        config: the config of its model.
        index: its number there.
    """

    label: str
    config: Config
    index: int

    def __str__(self) -> str:
        return f"layer {self.index} of {self.label}"


@dataclass(frozen=True)
class Rule:
    """Keys that say one thing of each layer, in their own way.

    Attributes:
        keys: the keys, the one that messages name first.
        says: from a config that has the first key, and its depth: one value per layer.
        write: from the values of the stacked layers and the donor's config: the keys to change.
            Raises `_Unsayable` with the number of the first layer that does not fit.
    """

    keys: tuple[str, ...]
    says: Callable[[Config, int], list[Any]]
    write: Callable[[list[Any], Config], Config]


class _Unsayable(Exception):
    """The keys of a rule cannot say what the values are; carries a layer number and why."""

    def __init__(self, layer: int, why: str) -> None:
        super().__init__(why)
        self.layer = layer


NOT_PER_LAYER = {
    "architectures",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "begin_suppress_tokens",
    "suppress_tokens",
    "block_types",
    "attention_types",
    "mlp_multipliers",
    "ssm_multipliers",
    "time_step_limit",
    "mtp_layer_types",
    "mtp_mlp_layer_types",
    "mtp_layers_block_type",
    "mtp_local_layer_ids",
    "vision_feature_layer",
    "keys_to_ignore_at_inference",
    "L_bp_cycles",
}
"""Lists that may be as long as the model is deep, and are not about its layers."""


def _numbered(key: str, first: int = 0) -> Rule:
    """A list of the numbers of the layers that are of a kind, counted from `first`."""

    def says(config: Config, depth: int) -> list[bool]:
        return [layer + first in (config[key] or []) for layer in range(depth)]

    def write(values: list[bool], donor: Config) -> Config:
        return {key: [layer + first for layer, value in enumerate(values) if value]}

    return Rule((key,), says, write)


def _leading(key: str, *, exact: bool = True) -> Rule:
    """How many layers at the beginning are of a kind; if not `exact`, a list says the rest."""

    def says(config: Config, depth: int) -> list[bool]:
        return [layer < config[key] for layer in range(depth)]

    def write(values: list[bool], donor: Config) -> Config:
        count = values.index(False) if False in values else len(values)
        if exact and True in values[count:]:
            layer = values.index(True, count)
            raise _Unsayable(layer, f"it counts layers from the first one, and layer {count} ends")
        return {key: count}

    return Rule((key,), says, write)


def _tapped(key: str) -> Rule:
    """The numbers of layers whose outputs are used elsewhere, each by a part of its own."""

    def says(config: Config, depth: int) -> list[int | None]:
        taps = list(config[key])
        return [taps.index(layer) if layer in taps else None for layer in range(depth)]

    def write(values: list[int | None], donor: Config) -> Config:
        found = [layer for layer, value in enumerate(values) if value is not None]
        wanted = range(len(donor[key]))
        if [values[layer] for layer in found] != list(wanted):
            why = f"each of the layers {list(donor[key])} is needed once, in this order"
            raise _Unsayable(found[-1] if found else 0, why)
        return {key: found}

    return Rule((key,), says, write)


def _trailing(key: str) -> Rule:
    """How many layers at the end are of a kind."""

    def says(config: Config, depth: int) -> list[bool]:
        return [layer >= depth - config[key] for layer in range(depth)]

    def write(values: list[bool], donor: Config) -> Config:
        count = values[::-1].index(False) if False in values else len(values)
        if True in values[: len(values) - count]:
            last = len(values) - 1 - count
            raise _Unsayable(values.index(True), f"it counts from the end, and layer {last} is not")
        return {key: count}

    return Rule((key,), says, write)


def _spelt(key: str) -> Rule:
    """A string with one letter per layer."""

    def says(config: Config, depth: int) -> list[str]:
        return list(config[key])

    def write(values: list[str], donor: Config) -> Config:
        return {key: "".join(values)}

    return Rule((key,), says, write)


def _by_number(key: str) -> Rule:
    """Settings of single layers by their number; a layer without any has the model's."""

    def says(config: Config, depth: int) -> list[Any]:
        numbers = {int(number): settings for number, settings in (config[key] or {}).items()}
        return [numbers.get(layer) for layer in range(depth)]

    def write(values: list[Any], donor: Config) -> Config:
        return {key: {str(i): value for i, value in enumerate(values) if value is not None}}

    return Rule((key,), says, write)


def _periodic(period: str, offset: str) -> Rule:
    """Every so many layers one is of a kind, from a first one on."""

    def says(config: Config, depth: int) -> list[bool]:
        return [layer % config[period] == config[offset] for layer in range(depth)]

    def write(values: list[bool], donor: Config) -> Config:
        before = (donor[period], donor[offset])
        fits = [(p, o) for p in range(1, len(values) + 2) for o in range(p)]
        for p, o in (before, *fits):
            if all((layer % p == o) is value for layer, value in enumerate(values)):
                return {period: p, offset: o}
        raise _Unsayable(values.index(True), "no period and offset give these layers")

    return Rule((period, offset), says, write)


def _sparse_says(config: Config, depth: int) -> list[bool]:
    dense, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step") or 1
    return [i in dense or (i + 1) % step != 0 for i in range(depth)]


def _sparse_write(values: list[bool], donor: Config) -> Config:
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, dense in enumerate(values) if dense],
    }


def _ernie_says(config: Config, depth: int) -> list[bool]:
    start, end = config.get("moe_layer_start_index") or 0, config.get("moe_layer_end_index", -1)
    step, end = config.get("moe_layer_interval") or 1, depth - 1 if end in (-1, None) else end
    return [start <= i <= end and (i + 1) % step == 0 for i in range(depth)]


def _ernie_write(values: list[bool], donor: Config) -> Config:
    where = [i for i, sparse in enumerate(values) if sparse]
    start, end = (where[0], where[-1]) if where else (len(values), len(values) - 1)
    for step in range(1, len(values) + 1):
        if where == [i for i in range(start, end + 1) if (i + 1) % step == 0]:
            return {
                "moe_layer_start_index": start,
                "moe_layer_end_index": end,
                "moe_layer_interval": step,
            }
    raise _Unsayable(where[0], "no start, end and interval give these layers")


def _depth_scale(config: Config, depth: int) -> list[float]:
    return [config["scale_depth"] / math.sqrt(depth)] * depth


def _write_depth_scale(values: list[float], donor: Config) -> Config:
    """MiniCPM multiplies residuals by scale_depth / sqrt(layers)."""
    odd = next((i for i, value in enumerate(values) if value != values[0]), None)
    if odd is not None:
        raise _Unsayable(odd, "the models scale their residuals differently")
    root = math.sqrt(len(values))
    near = values[0] * root
    # Rounding may be one step off; the quotient is to be the same number.
    for scale in (near, math.nextafter(near, math.inf), math.nextafter(near, 0.0)):
        if scale / root == values[0]:
            return {"scale_depth": scale}
    raise _Unsayable(0, "no number gives exactly the same scale for the new number of layers")


def _repeated_says(config: Config, depth: int) -> list[str]:
    types = list(config["block_types"])
    return [types[layer % len(types)] for layer in range(depth)]


def _gpt_neo_says(config: Config, depth: int) -> list[str]:
    return [kind for kinds, times in config["attention_types"] for kind in list(kinds) * times]


def _kimi_says(config: Config, depth: int) -> list[bool | None]:
    full = config["linear_attn_config"].get("full_attn_layers")
    return [None if full is None else layer + 1 in full for layer in range(depth)]


def _kimi_write(values: list[bool | None], donor: Config) -> Config:
    if values[0] is None:
        return {}
    both = {
        "full_attn_layers": [i + 1 for i, full in enumerate(values) if full],
        "kda_layers": [i + 1 for i, full in enumerate(values) if not full],
    }
    return {"linear_attn_config": {**donor["linear_attn_config"], **both}}


def _write_indexers(values: list[str], donor: Config) -> Config:
    """A layer with a "shared" indexer attends to what the layer before it selected."""
    if values and values[0] == "shared":
        raise _Unsayable(0, "it would attend to what the layer before it selects, and is the first")
    return {"indexer_types": values}


_SPARSE = ("decoder_sparse_step", "mlp_only_layers")
_ERNIE = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")

RULES = (
    *map(_numbered, ("attn_layer_indices", "full_attn_idxs", "moe_layers", "local_layer_ids")),
    *map(_numbered, ("fullatt_block_indexes", "cross_attention_layers")),
    _numbered("ple_layer_ids", first=1),
    _tapped("deepstack_visual_indexes"),
    *map(_leading, ("first_k_dense_replace", "num_dense_layers", "num_hash_layers")),
    _leading("dense_mlp_idx"),
    _leading("max_window_layers", exact=False),
    _trailing("num_kv_shared_layers"),
    *map(_spelt, ("hybrid_override_pattern", "index_topk_pattern")),
    _by_number("per_layer_config"),
    _periodic("attn_layer_period", "attn_layer_offset"),
    _periodic("expert_layer_period", "expert_layer_offset"),
    Rule(_SPARSE, _sparse_says, _sparse_write),
    Rule(_SPARSE[::-1], _sparse_says, _sparse_write),
    Rule(_ERNIE, _ernie_says, _ernie_write),
    Rule(("indexer_types",), lambda c, _: c["indexer_types"], _write_indexers),
    Rule(("scale_depth",), _depth_scale, _write_depth_scale),
    Rule(("block_types",), _repeated_says, lambda values, _: {"block_types": values}),
    Rule(("attention_types",), _gpt_neo_says, lambda v, _: {"attention_types": [[v, 1]]}),
    Rule(("linear_attn_config",), _kimi_says, _kimi_write),
)

INSTEAD = {
    "first_k_dense_replace": "mlp_layer_types",
    "num_hash_layers": "mlp_layer_types",
    "dense_mlp_idx": "mlp_layer_types",
}
"""Keys that only some patterns fit, and the list that families read before them if they have it."""


def restack(donor: Config, layers: Sequence[Origin], lists: frozenset[str] = frozenset()) -> Config:
    """Return `donor` for a stack of `layers`.

    Args:
        donor: config that everything not per layer comes from.
        layers: for each output layer, the one that it comes from.
        lists: lists with an entry per layer that the family reads where they are written.

    Lists with one entry per layer (`layer_types`, ...) and everything that `RULES` knows follow
    the layers.

    Raises:
        LayerFieldError: a source of a layer does not have what the donor has per layer, or a key
            cannot say what the stack is.
    """
    result = copy.deepcopy(donor)
    depth = n_layers(donor)
    result.update({key: len(layers) for key in _DEPTH_KEYS if depth and donor.get(key) == depth})
    ruled = {key for rule in RULES for key in rule.keys}
    for key, value in donor.items():
        if isinstance(value, list) and len(value) == depth and key not in ruled | NOT_PER_LAYER:
            result[key] = [_entry(origin, key) for origin in layers]
    for rule in RULES:
        if donor.get(rule.keys[0]) is None:
            continue
        values = [_said(rule, origin) for origin in layers]
        try:
            result.update(rule.write(values, donor))
        except _Unsayable as error:
            if INSTEAD.get(rule.keys[0]) in lists:
                continue
            what = f'"{rule.keys[0]}" cannot say what layer {error.layer} of the stack is'
            raise LayerFieldError(f"{what} ({layers[error.layer]}): {error}") from None
    return result


def _entry(origin: Origin, key: str) -> Any:
    theirs = origin.config.get(key)
    if not isinstance(theirs, list) or len(theirs) != n_layers(origin.config):
        what = f'"{key}" has an entry for each layer, but not in {origin.label}'
        raise LayerFieldError(what)
    return theirs[origin.index]


def _said(rule: Rule, origin: Origin) -> Any:
    key, config = rule.keys[0], origin.config
    if config.get(key) is None:
        raise LayerFieldError(f'{origin.label} has no "{key}", which says what its layers are')
    return rule.says(config, n_layers(config) or 0)[origin.index]

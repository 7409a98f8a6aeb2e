"""Owns what a family derives for each layer from its config, and writing it out for a stack.

Asks transformers' configuration classes, whose rules are the models' own; builds no model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moeforge.configs import Config, layer_key, n_layers, plain_floats
from moeforge.planners.layer_keys import NOT_PER_LAYER, RULES, LayerFieldError, Origin, restack

_ALWAYS = """
    apertus arcee aria_text biogpt bitnet bloom codegen cohere ctrl ernie4_5 flex_olmo gemma glm
    glm4 gpt_bigcode gpt_neox gptj granite granitemoe granitemoeshared helium
    hunyuan_v1_dense hyperclovax internlm3 iquestcoder jais2 jetmoe llama ministral3 mistral mixtral
    mpt nanochat nemotron olmo olmo2 olmoe openai-gpt opt persimmon phi phi3 phimoe seed_oss
    stablelm starcoder2 xglm youtu
"""

UNIFORM: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_ALWAYS.split(), ()),
    **dict.fromkeys(("gpt2", "gpt-sw3"), ("scale_attn_by_inverse_layer_idx",)),
    "qwen2": ("use_sliding_window", "layer_types"),
    "qwen3": ("use_sliding_window", "layer_types"),
}
"""Families whose layers are all of one kind, unless one of the keys is set.

For these transformers is not asked, so that a plan is made at once; a test compares their layers.
"""


def is_uniform(config: Config) -> bool:
    """Say whether the layers of the family do not depend on their number."""
    unless = UNIFORM.get(str(config.get("model_type")))
    return unless is not None and not any(config.get(key) for key in unless)


def read(config: Config) -> Any:
    """Return transformers' own configuration for `config`, or None where it knows no layers of it.

    Raises:
        LayerFieldError: transformers refuses the config, with its reason.
    """
    from transformers import CONFIG_MAPPING

    from moeforge.forward import quiet

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        return None
    try:
        with quiet():
            known = CONFIG_MAPPING[kind].from_dict(plain_floats(config))
    except Exception as error:  # each family has its own checks
        reason = str(error).strip().splitlines()[-1].strip()
        raise LayerFieldError(f"transformers' {kind} cannot be configured so: {reason}") from None
    return known if hasattr(known, "num_hidden_layers") else None


def depth_of(known: Any) -> int:
    """Return the number of layers of configuration `known`."""
    # LongCat-Flash counts the two attentions of each of its layers in num_hidden_layers.
    return int(getattr(known, "num_layers", None) or known.num_hidden_layers)


def lists(known: Any) -> dict[str, list[Any]]:
    """Return what configuration `known` has for each layer, by name: stored or derived.

    Raises:
        LayerFieldError: it cannot be derived.
    """
    depth = depth_of(known)
    names = [*vars(known), *(n for n in dir(type(known)) if _is_property(type(known), n))]
    found = {}
    for name in names:
        if name.startswith("_") or name in NOT_PER_LAYER:
            continue
        try:
            value = getattr(known, name, None)
        except Exception as error:  # each family has its own checks
            raise LayerFieldError(f"transformers cannot derive {name}: {error}") from None
        if isinstance(value, (list, tuple)) and len(value) == depth:
            found[name] = list(value)
    return found


def _is_property(kind: type, name: str) -> bool:
    return isinstance(getattr(kind, name, None), property)


def stacked_config(donor: Config, layers: Sequence[Origin]) -> Config:
    """Return `donor` for a stack of `layers`, whatever the family derives written out.

    Raises:
        LayerFieldError: the config of the family cannot say what the stack is.
    """
    if all(is_uniform(config) for config in (donor, *(origin.config for origin in layers))):
        return restack(donor, layers)
    known = {id(origin.config): read(origin.config) for origin in layers}
    mine = read(donor)
    if mine is None or any(each is None for each in known.values()):
        return restack(donor, layers)
    full = {id(o.config): _filled(o.config, known[id(o.config)], mine, donor) for o in layers}
    origins = [replace(origin, config=full[id(origin.config)]) for origin in layers]
    whole = _filled(donor, mine, mine, donor)
    result = restack(whole, origins, frozenset(lists(mine)))
    for key in whole.keys() - donor.keys():
        if result[key] == whole[key]:
            del result[key]  # the family's default still holds
    return _written(result, origins, {key: lists(each) for key, each in known.items()}, layers)


def _filled(config: Config, known: Any, mine: Any, donor: Config) -> Config:
    """Return `config` with what it leaves out and rules or the donor's lists speak of."""
    depth = n_layers(donor)
    per_layer = {k for k, v in donor.items() if isinstance(v, list) and len(v) == depth}
    result = {layer_key(donor): depth_of(known), **config}
    for key in {key for rule in RULES for key in rule.keys} | (per_layer - NOT_PER_LAYER):
        value = getattr(known, key, None)
        if result.get(key) is None and value is not None and key not in ("per_layer_config",):
            result[key] = copy.deepcopy(value)
    return result


def _written(
    result: Config,
    origins: Sequence[Origin],
    derived: dict[int, dict[str, list[Any]]],
    layers: Sequence[Origin],
) -> Config:
    """Return `result` with the lists written that the family would derive otherwise."""
    wanted = {
        name: [derived[id(origin.config)][name][origin.index] for origin in layers]
        for name in set.intersection(*(set(found) for found in derived.values()))
    }
    for _ in range(2):  # a list may follow from another one that is written now
        known = read(result)
        made = lists(known)
        wrong = sorted(name for name, values in wanted.items() if made.get(name) != values)
        if not wrong:
            return result
        free = [n for n in wrong if n not in result and not _is_property(type(known), n)]
        result = {**result, **{name: wanted[name] for name in free}}
    name = wrong[0]
    values = made.get(name) or [None] * len(layers)
    layer = next(i for i, value in enumerate(wanted[name]) if value != values[i])
    what = f'"{name}" of layer {layer} of the stack would be {values[layer]!r}'
    raise LayerFieldError(f"{what}, where {layers[layer]} has {wanted[name][layer]!r}")

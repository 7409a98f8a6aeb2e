"""Owns dense types whose tensors are llama's in other names, orders or scales."""

from __future__ import annotations

import re
from collections.abc import Callable

from moeforge.configs import Config
from moeforge.families import Tensors
from moeforge.families._transforms import half_split, renamed, split
from moeforge.plans import PlannedTensor

_ROTATED = re.compile(r"\.self_attn\.[qk]_proj\.(weight|bias)$")


def unfused(config: Config, tensors: Tensors) -> Tensors:
    """Take apart phi3's qkv_proj and gate_up_proj; glm's gate_up_proj is the same."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    counts = tuple(config["head_dim"] * n for n in (heads, groups, groups))
    result: dict[str, PlannedTensor] = {}
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition("_proj.")
        if stem.endswith(".self_attn.qkv"):
            layer = stem.removesuffix("qkv")
            names = [f"{layer}{p}_proj.{part}" for p in "qkv"]
            parts = split(tensor, names, counts)
        elif stem.endswith(".mlp.gate_up"):
            layer, half = stem.removesuffix("gate_up"), tensor.spec.shape[0] // 2
            names = [f"{layer}{p}_proj.{part}" for p in ("gate", "up")]
            parts = split(tensor, names, (half, half))
        else:
            result[name] = tensor
            continue
        result.update((made.name, made) for made in parts)
    return result


def rotated_in_halves(
    rotated: Callable[[Config], int | None] = lambda config: None,
) -> Callable[[Config, Tensors], Tensors]:
    """Return a transform from rotary embeddings of neighbouring dimensions to those in halves.

    Args:
        rotated: (config) -> leading dimensions of each head that are rotated; None for all.
    """

    def transform(config: Config, tensors: Tensors) -> Tensors:
        def turned(name: str, tensor: PlannedTensor) -> PlannedTensor:
            if not _ROTATED.search(name):
                return tensor
            return half_split(tensor, config["head_dim"], rotated(config))

        return {name: turned(name, tensor) for name, tensor in tensors.items()}

    return transform


def squared_relu_as_gated(config: Config, tensors: Tensors) -> Tensors:
    """Write MLPs of relu(z)² as gated ones with relu, for relu(z)² = relu(z)·z: both are `up`."""
    result = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(".mlp.up_proj.weight"):
            gate = name.replace(".up_proj.", ".gate_proj.")
            result[gate] = renamed(tensor, gate)
    return result


def internlm3_refuse(config: Config) -> str:
    """Return why this internlm3 is not a llama without biases, or ""."""
    # Two names for each: those of transformers and those of the model's own code before.
    names = ("attention_bias", "qkv_bias", "mlp_bias", "bias")
    if said := [name for name in names if config.get(name)]:
        return f"experts have no biases here, InternLM3 has them in all its layers ({said[0]})"
    return ""

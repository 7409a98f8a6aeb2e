"""Owns what quantised checkpoints look like: which are refused, and float8 that can be undone.

Knows configs, names and shapes; the arithmetic is in `engine/dequantize.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moeforge.errors import Finding, SourceError
from moeforge.tensors import BY_NAME, DType, TensorSpec

KEYS = ("quantization_config", "compression_config")
"""Where config.json says how the weights are stored."""

_FLOAT8_METHODS = {"fp8", "fbgemm_fp8"}
_PACKED = (
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "GPTQ or AWQ"),
    (re.compile(r"\.(quant_state\.\w+|weight_format)$"), "bitsandbytes"),
    (re.compile(r"\.(weight_packed|weight_zero_point)$"), "compressed-tensors"),
    (re.compile(r"_proj_blocks$"), "mxfp4"),
    (re.compile(r"\.codes$"), "AQLM"),
    (re.compile(r"\.W_q$"), "HQQ"),
)
"""Names under which packed integers are stored, where no config says it."""

_SCALES = ("_scale_inv", "_scale")
"""What follows the name of float8 codes in the name of their scales: DeepSeek, and all others."""

_ACTIVATIONS = re.compile(
    r"\.(input_scale|input_scale_ub|activation_scale|output_scale|[kvq]_scale|[kv]_cache_scale)$"
)
ACTIVATION_SCALE = "scale of activations: the output computes in its own dtype"


def _is_float8(settings: Mapping[str, Any]) -> bool:
    """Say whether a quantization config means float8 weights with one scale each, and no more."""
    if settings.get("quant_method") in _FLOAT8_METHODS:
        return True
    groups = settings.get("config_groups")
    if settings.get("quant_method") != "compressed-tensors" or not isinstance(groups, dict):
        return False
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        return False
    weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
    return all(
        isinstance(each, dict) and each.get("type") == "float" and each.get("num_bits") == 8
        for each in weights
    )


def _describe(settings: Any) -> str:
    """Return method and bits of a quantization config, as far as it says them."""
    if not isinstance(settings, dict):
        return str(settings)
    bits = settings.get("bits") or settings.get("w_bit")
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        bits = bits or (weights.get("num_bits") if isinstance(weights, dict) else None)
    for key, count in (("load_in_4bit", 4), ("load_in_8bit", 8)):
        bits = bits or (count if settings.get(key) else None)
    method = settings.get("quant_method", "of an unnamed method")
    return f"{method}, {bits}-bit" if bits else str(method)


def refuse_quantized(key: str, config: Mapping[str, Any], original: str = "") -> None:
    """Refuse a checkpoint whose config says that it is quantised otherwise than to float8.

    Args:
        key: name of the model.
        config: its config.json.
        original: what it was made from, if that is known.

    Raises:
        SourceError: it is.
    """
    settings = next((config[name] for name in KEYS if config.get(name)), None)
    if settings is None or (isinstance(settings, dict) and _is_float8(settings)):
        return
    what = f"{key} is quantised ({_describe(settings)}); its numbers cannot be merged"
    named = f", which its card names: {original}" if original else ""
    raise SourceError(Finding(what, f"Use the 16-bit original{named}."))


def refuse_packed(key: str, specs: Mapping[str, TensorSpec]) -> None:
    """Refuse a checkpoint that holds packed integers, whatever its config says.

    Raises:
        SourceError: it does; names a tensor.
    """
    for name, spec in specs.items():
        if "int" not in spec.dtype.name:
            continue
        method = next((method for pattern, method in _PACKED if pattern.search(name)), "")
        if not method and any(name + end in specs for end in _SCALES):
            method = "integers with scales"
        if method:
            what = f"{key} is quantised: it has {name} ({spec}; {method})"
            raise SourceError(Finding(what, "Use the 16-bit original."))


def is_float8(dtype: DType) -> bool:
    """Say whether tensors of `dtype` are codes that mean nothing without their scales."""
    return dtype.name in ("float8_e4m3fn", "float8_e5m2")


def is_activation_scale(name: str) -> bool:
    """Say whether tensor `name` scales what flows through the model, not its weights."""
    return bool(_ACTIVATIONS.search(name))


def plain_dtype(config: Mapping[str, Any]) -> DType:
    """Return the dtype in which a float8 model computes: what its config says, else bfloat16."""
    found = BY_NAME.get(str(config.get("dtype") or config.get("torch_dtype")))
    return found if found and found.mergeable else BY_NAME["bfloat16"]


def block_length(total: int, scales: int) -> int | None:
    """Return how many of `total` rows (or columns) share one of `scales`; None if that is unclear.

    All share one, each has its own, or they come in blocks of 128, the last one shorter: there is
    no other published float8 format.
    """
    if scales == 1:
        return max(total, 1)
    if scales == total:
        return 1
    return 128 if scales == -(-total // 128) else None


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return [block rows, block columns] of a scale tensor: one number, one for each row, or both.

    Raises:
        ValueError: it has more dimensions.
    """
    rows, columns, *rest = (*shape, 1, 1)
    if any(size != 1 for size in rest):
        raise ValueError(f"a scale of shape {list(shape)}")
    return rows, columns


def _stated_block(config: Mapping[str, Any]) -> list[int] | None:
    """Return rows and columns of the blocks that share a scale, where the config says them."""
    for settings in filter(None, map(config.get, KEYS)):
        groups = settings.get("config_groups") or {}
        weights = [group["weights"].get("block_structure") for group in groups.values()]
        for block in (settings.get("weight_block_size"), *weights):
            if isinstance(block, list) and len(block) == 2:
                return block
    return None


def find_scales(
    key: str, specs: Mapping[str, TensorSpec], config: Mapping[str, Any]
) -> dict[str, str]:
    """Return the name of the scale tensor of each float8 tensor.

    Raises:
        SourceError: a float8 tensor has none, or one that does not fit it.
    """
    scales = {}
    stated = _stated_block(config)
    for name, spec in specs.items():
        if not is_float8(spec.dtype):
            continue
        scale = next((name + end for end in _SCALES if name + end in specs), None)
        if scale is None:
            what = (
                f"{key}: {name} is {spec} and has no {name}{_SCALES[0]} and no {name}{_SCALES[1]}"
            )
            raise SourceError(Finding(what, "Use the 16-bit original, or export it again."))
        if problem := _misfit(spec, specs[scale], stated):
            what = f"{key}: {scale} is {specs[scale]}, which {problem} of {name}, {spec}"
            raise SourceError(Finding(what, "Use the 16-bit original."))
        scales[name] = scale
    return scales


def _misfit(codes: TensorSpec, scale: TensorSpec, stated: list[int] | None) -> str:
    """Return why `scale` cannot be that of `codes`; empty where it can."""
    if len(codes.shape) != 2 or len(scale.shape) > 2 or "float" not in scale.dtype.name:
        return "is not a scale for blocks"
    for i, (total, count) in enumerate(zip(codes.shape, scale_shape(scale.shape), strict=True)):
        block = block_length(total, count)
        if block is None or (count > 1 and stated and stated[i] != block):
            return f"does not divide the {('rows', 'columns')[i]}"
    return ""

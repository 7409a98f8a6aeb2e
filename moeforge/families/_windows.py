"""Owns which layers of a dense model look back through a window only, whatever its config calls it.

Knows configs; no tensor, and not how a MoE family says the same.
"""

from __future__ import annotations

from moeforge.configs import Config

SLIDING, FULL = "sliding_attention", "full_attention"
_IN_ALL_LAYERS = ("mistral", "ministral3", "phi3")
"""Types that read `sliding_window` and no `layer_types`."""
_SLIDE = (*_IN_ALL_LAYERS, "cwm", "ministral", "qwen2", "qwen3")
"""Types that know windows; in the config of others, such as llama, the key means nothing."""


def _kinds(config: Config) -> list[str]:
    """Return the kind of attention of each layer of a model that has a window."""
    depth, kind = range(config["num_hidden_layers"]), config["model_type"]
    if kind in _IN_ALL_LAYERS:
        return [SLIDING for _ in depth]
    if config.get("layer_types"):
        return list(config["layer_types"])
    if kind == "cwm":
        return [SLIDING if layer % 4 else FULL for layer in depth]
    if kind in ("qwen2", "qwen3"):
        return [SLIDING if layer >= config["max_window_layers"] else FULL for layer in depth]
    return [SLIDING for _ in depth]


def windows(config: Config) -> tuple[list[str], int | None]:
    """Return the kind of attention of each layer, and the window of those that slide.

    Args:
        config: completed config of a dense model.

    Returns:
        One of SLIDING and FULL for each layer; None for the window where no layer slides.
    """
    window = config.get("sliding_window") if config["model_type"] in _SLIDE else None
    if not window or config.get("use_sliding_window") is False:
        return [FULL] * config["num_hidden_layers"], None
    kinds = _kinds(config)
    return kinds, (int(window) if SLIDING in kinds else None)


def mixed(config: Config) -> bool:
    """Say whether some layers slide and others do not."""
    return len(set(windows(config)[0])) > 1

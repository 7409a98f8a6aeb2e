"""Owns what a step keeps in memory for its gradient, and doing without where memory is short."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeforge import system

if TYPE_CHECKING:
    from torch import nn

_KEPT_WIDTHS = 24
"""Activations per token and layer, in hidden sizes, experts apart: an upper bound."""


def save_memory(model: nn.Module, tokens: int, active: int, device: Any) -> bool:
    """Let layers be computed again for their gradients where memory is short; say whether it is.

    Args:
        model: a mixture in transformers.
        tokens: most tokens of a step.
        active: experts per token.
        device: torch.device that it runs on.
    """
    if kept_bytes(model, tokens, active) <= free_memory(device):
        return False
    anything: Any = model
    # The name that transformers 5 began with, and the later one.
    enable = getattr(anything, "activation_checkpointing_enable", None)
    (enable or anything.gradient_checkpointing_enable)({"use_reentrant": False})
    for module in model.modules():
        # Layers look at it before they do; what is in them must not begin to drop out.
        module.training = hasattr(module, "gradient_checkpointing")
    return True


def kept_bytes(model: nn.Module, tokens: int, active: int) -> int:
    """Return about how many bytes of activations a step keeps for its gradient, in float32."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    hidden = int(getattr(config, "hidden_size", 0) or config.d_model)
    layers = int(getattr(config, "num_hidden_layers", 0) or config.n_layers)
    widths = (getattr(config, key, None) for key in ("moe_intermediate_size", "intermediate_size"))
    width = next((int(width) for width in widths if isinstance(width, int)), 4 * hidden)
    per_layer = _KEPT_WIDTHS * hidden + active * (4 * width + 2 * hidden)
    return 4 * tokens * (layers * per_layer + 3 * int(config.vocab_size))


def free_memory(device: Any) -> int:
    """Return the bytes that are free on `device`."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return system.free_memory()

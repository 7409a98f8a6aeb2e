"""Owns how many experts a token passes through while routers are trained.

With one expert its weight is always one, and no gradient reaches the router: training takes two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moeforge.errors import BuildError, Finding
from moeforge.recipe.tuning import Tuning

if TYPE_CHECKING:
    from torch import nn

_ACTIVE = ("top_k", "per_token")
"""What transformers' router modules, and those of our own code, call the experts per token."""


def active_experts(settings: Tuning, per_token: int, experts: int) -> int:
    """Return how many experts each token passes through while training.

    Raises:
        BuildError: the settings ask for fewer than the mixture has, or for more than there are.
    """
    if settings.active is None:
        return min(max(per_token, 2), experts)
    if not per_token <= settings.active <= experts:
        what = f"active is {settings.active}; the mixture has {experts} experts, {per_token} active"
        raise BuildError(Finding(what, f"Give a number from {per_token} to {experts}."))
    return settings.active


@contextmanager
def active(model: nn.Module, before: int, now: int) -> Iterator[None]:
    """Let each token pass through `now` experts instead of `before`."""
    config: Any = model.config
    places: list[tuple[Any, str]] = [
        (module, name)
        for module in model.modules()
        for name in _ACTIVE
        if getattr(module, name, None) == before
    ]
    if getattr(config, "top_k_experts", None) == before:  # gemma4 reads its config at each call
        places.append((config, "top_k_experts"))
    if now != before and not places:
        what = f"{config.model_type} models do not say where their experts per token are set"
        raise BuildError(Finding(what, f"Leave out active, or give {before}."))
    for holder, name in places:
        setattr(holder, name, now)
    try:
        yield
    finally:
        for holder, name in places:
            setattr(holder, name, before)

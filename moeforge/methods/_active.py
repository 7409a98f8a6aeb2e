"""Owns what ram and ramplus_tl share: where models differ from the base, alone or together.

Source: Yuan et al., "Behavior knowledge merge in reinforced agentic models", arXiv 2601.13572.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeforge.methods._task import deltas

if TYPE_CHECKING:
    from torch import Tensor


def active(tensors: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Find where models differ from the base, which is the first of `tensors`.

    Returns:
        Each model's differences where they exceed `epsilon`, zero elsewhere, [models, elements]; 1
        and 0 for where that is; and how many models differ at each element, [elements].
    """
    import torch

    parts = deltas(tensors)
    where = torch.gt(parts.abs(), epsilon, out=torch.empty_like(parts))
    return parts.mul_(where), where, where.sum(0)

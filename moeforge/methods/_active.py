"""Owns what ram and ramplus_tl share: where models differ from the base, alone or together.

Source: "RAM: Reinforced Agent Merging", arXiv 2601.13572.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moeforge.methods._task import deltas

if TYPE_CHECKING:
    from torch import Tensor


def active(tensors: Sequence[Tensor], epsilon: float) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Return each model's differences from the base where they exceed `epsilon`, zero elsewhere;
    1 and 0 for where that is; and how many models differ at each element.
    """  # noqa: D205
    import torch

    parts = deltas(tensors)
    where = [torch.gt(part.abs(), epsilon, out=torch.empty_like(part)) for part in parts]
    count = torch.zeros_like(parts[0])
    for part, mask in zip(parts, where, strict=True):
        part.mul_(mask)
        count.add_(mask)
    return parts, where, count

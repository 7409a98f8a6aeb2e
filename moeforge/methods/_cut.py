"""Owns cuts: which elements of a tensor are the k of greatest magnitude."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """The k elements of greatest magnitude: those above `value`, those equal to it up to `last`.

    Attributes:
        value: the k-th largest magnitude.
        last: number of the last element of magnitude `value` that belongs to them.
    """

    value: float
    last: int

    def __call__(self, magnitudes: Tensor, start: int) -> Tensor:
        """Return 1 for elements that belong and 0 for others, in the dtype of `magnitudes`."""
        import torch

        # Comparisons into floats: several times faster than through bools.
        kept = torch.empty_like(magnitudes)
        border = min(max(self.last + 1 - start, 0), magnitudes.numel())
        torch.ge(magnitudes[:border], self.value, out=kept[:border])
        torch.gt(magnitudes[border:], self.value, out=kept[border:])
        return kept

    def trim(self, values: Tensor, start: int) -> None:
        """Set the elements of `values` whose magnitude does not belong to zero."""
        import numpy as np
        import torch

        border = min(max(self.last + 1 - start, 0), values.numel())
        kind = np.float32 if values.dtype == torch.float32 else np.float64
        below = float(np.nextafter(kind(self.value), kind(0)))
        # Each keeps what lies strictly beyond its bound, on both sides, in one pass.
        if border and self.value:
            torch.ops.aten.hardshrink.out(values[:border], below, out=values[:border])
        if border < values.numel():
            torch.ops.aten.hardshrink.out(values[border:], self.value, out=values[border:])


NONE = Cut(math.inf, -1)
"""Keeps nothing."""

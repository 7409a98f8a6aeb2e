"""Owns means on the sphere, worked out on Gram matrices.

Every vector that these methods meet is a sum of multiples of the inputs, so all angles follow from
the inputs' inner products: tensors are read once to measure and once to combine, and nothing of
them is held.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def combine(tensors: Tensor, factors: Sequence[float]) -> Tensor:
    """Return Σ fᵢ·xᵢ, in the memory of the first."""
    result = tensors[0].mul_(factors[0])
    for tensor, factor in zip(tensors[1:], factors[1:], strict=True):
        result.add_(tensor, alpha=factor)
    return result


def norms(gram: Tensor) -> Tensor:
    """Return the lengths of the vectors of a Gram matrix, [n]."""
    return gram.diagonal().clamp(min=0.0).sqrt()


def length(gram: Tensor, coefficients: Tensor) -> float:
    """Return ‖Σ cᵢvᵢ‖ for the vectors of a Gram matrix."""
    return math.sqrt(max(float(coefficients @ gram @ coefficients), 0.0))

"""Owns sums over whole tensors that do not depend on how the work is divided."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from moeforge.methods import BLOCK, Measurement, Place, Scan

if TYPE_CHECKING:
    from torch import Tensor


def blocks(tensor: Tensor) -> Iterable[Tensor]:
    """Return the blocks of a slice that begins at a block's start."""
    return tensor.split(BLOCK)  # type: ignore[no-any-return, no-untyped-call]


def absolute(tensor: Tensor) -> list[float]:
    """Return Σ|x| of each block, in float64."""
    import torch

    return [float(block.abs().sum(dtype=torch.float64)) for block in blocks(tensor)]


def add_up(sums: Iterable[Sequence[float]]) -> tuple[float, ...]:
    """Return the columns' sums, exactly rounded."""
    return tuple(map(math.fsum, zip(*sums, strict=True)))


def total(look: Callable[[Sequence[Tensor], Place], list[tuple[float, ...]]]) -> Measurement:
    """Scan once for tuples of sums, one tuple for each block, and return their totals."""

    def join(pieces: list[list[tuple[float, ...]]]) -> tuple[float, ...]:
        return add_up(sums for piece in pieces for sums in piece)

    return add_up((yield Scan(look, join)))


def gram(vectors: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> Measurement:
    """Scan once and return the Gram matrix ⟨vᵢ, vⱼ⟩ of whole tensors, [n, n] in float64.

    Products of float32 numbers are exact in float64, so the angle between nearly equal tensors
    keeps eight digits more than in float32.

    Args:
        vectors: the vectors of a slice, from its inputs.
    """
    import torch

    def look(tensors: Sequence[Tensor], place: Place) -> list[Tensor]:
        products = []
        for parts in zip(*map(blocks, vectors(tensors)), strict=True):
            matrix = torch.stack(parts).double()
            products.append((matrix @ matrix.T).cpu())
        return products

    def join(pieces: list[list[Tensor]]) -> Tensor:
        return torch.stack([product for piece in pieces for product in piece]).sum(0)

    return torch.stack((yield Scan(look, join))).sum(0)

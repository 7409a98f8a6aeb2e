"""Owns normal noise that follows from a key and the number of the element alone.

The same element gets the same noise whatever the slices, workers or device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeforge.methods._random import draws

if TYPE_CHECKING:
    from torch import Tensor


def add(values: Tensor, scale: float, key: int, start: int) -> None:
    """Add scale·z to elements from `start` on of a tensor, in place.

    Source: Box and Muller, "A note on the generation of random normal deviates", 1958: two uniform
    draws u, v in (0, 1) give the normal √(-2 ln u) · cos(2πv). Here each has 32 bits.

    Args:
        values: flat, in a floating dtype.
        scale: standard deviation.
        key: what the draws follow from.
        start: number of the first element.
    """
    import numpy as np
    import torch

    # Four draws of 16 bits are one word: the one of the element, for each counts by itself.
    words = draws(key, 4 * start, 4 * values.numel()).view("<u4").reshape(-1, 2)
    u, v = ((words.astype(np.float64) + 0.5) * 2.0**-32).T
    normal = np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)
    values.add_(torch.from_numpy(normal * scale).to(values))

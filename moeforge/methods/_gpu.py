"""Owns what methods compute otherwise on a GPU: in few large operations, and by integers alike.

Sums are added up in pairs, halves of a block onto halves, so that they depend on nothing but the
block: how torch reduces a dimension on a GPU depends on how many others there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from moeforge.methods import BLOCK

if TYPE_CHECKING:
    from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def block_sums(values: Tensor) -> Tensor:
    """Return the sums of the blocks of the last dimension: [..., elements] to [..., blocks].

    Of no elements there is one block, as on the CPU.
    """
    count = values.shape[-1]
    missing = max(-(-count // BLOCK), 1) * BLOCK - count
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    values = values.reshape(*values.shape[:-1], -1, BLOCK)
    while (half := values.shape[-1] // 2) > 0:
        values = values[..., :half] + values[..., half:]
    return values.squeeze(-1)


def gram(vectors: Tensor) -> list[Tensor]:
    """Return the Gram matrix of each block in float64, on the CPU: [n, elements] to [n, n] each."""
    count, wide = len(vectors), vectors.double()
    rows = [block_sums(wide[i] * wide[i:]) for i in range(count)]
    products = torch.empty(count, count, rows[0].shape[-1], dtype=torch.float64)
    for i, row in enumerate(rows):
        products[i, i:] = products[i:, i] = row.cpu()
    return list(products.movedim(-1, 0))


def tally(values: Tensor, quantities: Sequence[int], limits: Any) -> tuple[list[Any], list[Any]]:
    """Count and collect magnitudes for several thresholds: what `_select.Compiled.tally` gives.

    Args:
        values: magnitudes, [all quantities, elements].
        quantities: for each threshold, of what it is one.
        limits: numpy [thresholds, 4], lines of `_counted.Limits`, of the dtype of `values`.
    """
    import numpy as np

    if list(quantities) != list(range(len(values))):
        values = values[list(quantities)]
    first, stop, low, high = torch.from_numpy(limits).to(values.device).T[:, :, None]
    reaching = values >= stop
    within = (values >= first) & ~reaching
    counts = torch.stack([reaching.sum(1), (values == low).sum(1), (values == high).sum(1)])
    lengths = within.sum(1)
    found = values[within].cpu().numpy()
    ends = lengths.cumsum(0).tolist()
    return counts.T.tolist(), np.split(found, ends[:-1])


def equal(values: Tensor, value: float) -> Any:
    """Return the numbers of the elements that are equal to `value`; numpy, ascending."""
    return (values == value).nonzero().flatten().cpu().numpy()


def draws(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Return what `_random.draws` returns, on a device: int16 [count]."""
    first = start // 4
    words = torch.arange(first, (start + count + 3) // 4, dtype=torch.int64, device=device)
    words.mul_(_signed(_GOLDEN)).add_(_signed(key + _GOLDEN))
    for shift, factor in _MIX:
        words.bitwise_xor_(_shifted(words, shift)).mul_(_signed(factor))
    words.bitwise_xor_(_shifted(words, 31))
    begin = start - 4 * first
    return words.view(torch.int16)[begin : begin + count]


def thin(delta: Tensor, drawn: Tensor, bounds: Tensor) -> None:
    """Set elements of whole rows to zero, as `_rank.thin_by_rank` does.

    Args:
        delta: whole rows, flat; changed in place.
        drawn: int16, one for each element.
        bounds: int64 [2·row − 1], for sums of the first and the last rank of equal elements: what
            draws, as unsigned numbers, are below if they keep.
    """
    magnitudes = delta.abs().float().view(-1, len(bounds) // 2 + 1)
    ordered = magnitudes.sort(dim=1).values
    ranks = torch.searchsorted(ordered, magnitudes)
    ranks += torch.searchsorted(ordered, magnitudes, right=True) - 1
    delta.mul_(drawn.int() + 2**15 < bounds.to(delta.device)[ranks].view(-1))


def _signed(word: int) -> int:
    """Return 64 bits as torch's integers have them."""
    word &= 2**64 - 1
    return word - 2**64 if word >= 2**63 else word


def _shifted(words: Tensor, by: int) -> Tensor:
    """Return `words` shifted to the right as unsigned numbers."""
    return (words >> by).bitwise_and_((1 << (64 - by)) - 1)

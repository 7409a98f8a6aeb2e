"""Owns random draws that follow from a key and the number of the element alone.

The same element gets the same draw whatever the threads, slices or order. splitmix64 of a counter
(Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) gives four draws
of 16 bits each, so probabilities are rounded to multiples of 2⁻¹⁶.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from moeforge import kernels
from moeforge.methods import Params, Place
from moeforge.methods._task import densities, keep

if TYPE_CHECKING:
    from torch import Tensor

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def derive(*parts: object) -> int:
    """Return a key of 64 bits for `parts`, such as seed, tensor and input."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def draws(key: int, start: int, count: int) -> Any:
    """Return the draws of elements [start, start + count): a numpy array of int16, uniform."""
    import numpy as np

    if kernels.loaded():
        from moeforge.kernels.drawing import draws as compiled

        out = np.empty(count, np.int16)
        compiled(np.uint64(key), start, out)
        return out
    first = start // 4
    words = np.arange(first, (start + count + 3) // 4, dtype=np.uint64)
    words *= np.uint64(_GOLDEN)
    words += np.uint64((key + _GOLDEN) & _MASK)
    scratch = np.empty_like(words)
    for shift, factor in ((30, _MIX[0]), (27, _MIX[1])):
        np.right_shift(words, np.uint64(shift), out=scratch)
        words ^= scratch
        words *= np.uint64(factor)
    np.right_shift(words, np.uint64(31), out=scratch)
    words ^= scratch
    begin = start - 4 * first
    return words.astype("<u8", copy=False).view("<i2")[begin : begin + count]


def drop(index: int, delta: Tensor, params: Params, found: Any, place: Place) -> None:
    """Set elements of a delta to zero in place; each is kept with probability `density`.

    Source: Yu et al., "Language models are super Mario" (DARE), arXiv 2311.03099.
    """
    if delta.device.type == "cuda":
        limit = _limit(densities(params)[index])
        if limit >= 2**15:
            return
        key = derive(params["key"], index)
        from moeforge.methods._gpu import draws as drawn_there

        delta.mul_(drawn_there(key, place.start, delta.numel(), delta.device) < limit)
        return
    keep(delta, lucky(index, delta, params, place))


def chances(params: Params) -> tuple[Any, Any]:
    """Return by what kernels draw as `drop` does: keys of the deltas, and limits of their draws."""
    import numpy as np

    shares = densities(params)
    limits = np.array([_limit(share) for share in shares], np.int32)
    return keys_of(params["key"], len(shares)), limits


@lru_cache(maxsize=64)
def keys_of(key: int, count: int) -> Any:
    """Return the keys of the draws of `count` deltas, a numpy array of uint64."""
    import numpy as np

    return np.array([derive(key, index) for index in range(count)], np.uint64)


def _limit(share: float) -> int:
    """Return the number below which draws keep; 2**15 where all of them do."""
    return round(min(max(share, 0.0), 1.0) * 2**16) - 2**15


def lucky(index: int, delta: Tensor, params: Params, place: Place) -> Any:
    """Return which elements of a delta `drop` keeps: a numpy array of bools."""
    import numpy as np

    limit = _limit(densities(params)[index])
    if limit >= 2**15:
        return np.ones(delta.numel(), np.bool_)
    drawn = draws(derive(params["key"], index), place.start, delta.numel())
    return drawn < np.int16(limit)

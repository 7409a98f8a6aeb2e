"""Owns what a dense model computes around its weights and a MoE family does not: it goes into them.

Knows factors and names; which factors a dense type has is said in the family's file.
"""

from __future__ import annotations

from collections.abc import Mapping

from moeforge.dense import EMBEDDINGS, HEAD
from moeforge.families import Tensors
from moeforge.families._transforms import affine, renamed

ROUNDING = "in bfloat16 and float16 that rounds these weights once more"
"""What to say of weights that were computed and not copied."""


def own_head(tensors: Tensors) -> Tensors:
    """Return `tensors` with a head of their own: the embeddings as they are, where it was tied."""
    if HEAD in tensors:
        return tensors
    return {**tensors, HEAD: renamed(tensors[EMBEDDINGS], HEAD)}


def absorbed(tensors: Tensors, factors: Mapping[str, float], shift: float = 0.0) -> Tensors:
    """Return `tensors` with factor·tensor + shift for those whose names end in a key of `factors`.

    A factor of 1 without a shift leaves the bytes as they are.
    """
    result = dict(tensors)
    for name, tensor in tensors.items():
        for suffix, factor in factors.items():
            if name.endswith(suffix) and (factor, shift) != (1.0, 0.0):
                result[name] = affine(tensor, factor, shift)
    return result


def one_plus_norms(tensors: Tensors) -> Tensors:
    """Return `tensors` with 1 + w for the weights w of norms, for norms that multiply by 1 + w."""
    return absorbed(tensors, {"norm.weight": 1.0}, shift=1.0)

"""Owns how dense tensors are put into another family's layout: expressions, no bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moeforge.plans import (
    Affine,
    Concat,
    Fill,
    Gather,
    PlannedTensor,
    Rows,
    RowTable,
    Transpose,
)
from moeforge.tensors import TensorSpec


def rows(tensor: PlannedTensor, name: str, first: int, count: int) -> PlannedTensor:
    """Return `count` rows of `tensor` from `first` on, as tensor `name`."""
    spec = TensorSpec(tensor.spec.dtype, (count, *tensor.spec.shape[1:]))
    return PlannedTensor(name, spec, Rows(tensor.expr, first, count))


def split(
    tensor: PlannedTensor, names: Sequence[str], counts: Sequence[int]
) -> Iterator[PlannedTensor]:
    """Yield the parts of a fused projection, of `counts` rows each; they must be all its rows."""
    if sum(counts) != tensor.spec.shape[0]:
        raise ValueError(f"{tensor.name} has {tensor.spec.shape[0]} rows, not {sum(counts)}")
    first = 0
    for name, count in zip(names, counts, strict=True):
        yield rows(tensor, name, first, count)
        first += count


def affine(tensor: PlannedTensor, scale: float = 1.0, shift: float = 0.0) -> PlannedTensor:
    """Return scale·tensor + shift."""
    return PlannedTensor(tensor.name, tensor.spec, Affine(tensor.expr, scale, shift))


def renamed(tensor: PlannedTensor, name: str) -> PlannedTensor:
    """Return `tensor` under another name."""
    return PlannedTensor(name, tensor.spec, tensor.expr)


def transposed(tensor: PlannedTensor) -> PlannedTensor:
    """Return a matrix the other way round."""
    spec = TensorSpec(tensor.spec.dtype, tensor.spec.shape[::-1])
    return PlannedTensor(tensor.name, spec, Transpose(tensor.expr))


def constant(name: str, value: float, like: TensorSpec, shape: tuple[int, ...]) -> PlannedTensor:
    """Return a tensor of one value everywhere, in the dtype of `like`."""
    return PlannedTensor(name, TensorSpec(like.dtype, shape), Fill(value))


def fused(name: str, tensors: Sequence[PlannedTensor]) -> PlannedTensor:
    """Return the rows of `tensors` one after the other as tensor `name`."""
    spec = tensors[0].spec
    shape = (sum(tensor.spec.shape[0] for tensor in tensors), *spec.shape[1:])
    pieces = tuple((tensor.expr, tensor.spec) for tensor in tensors)
    return PlannedTensor(name, TensorSpec(spec.dtype, shape), Concat(pieces))


def permuted(tensor: PlannedTensor, order: Sequence[int]) -> PlannedTensor:
    """Return the rows of `tensor` in another order: row i of the result is row order[i]."""
    import numpy as np

    table = RowTable(np.zeros(len(order), dtype=np.int64), np.asarray(order, dtype=np.int64))
    return PlannedTensor(tensor.name, tensor.spec, Gather((tensor.expr,), table))


def half_split(tensor: PlannedTensor, head_dim: int, rotated: int | None = None) -> PlannedTensor:
    """Return a query or key projection (or its bias) for rotary embeddings in two halves.

    Families such as glm rotate neighbouring dimensions (0, 1), (2, 3), …; llama rotates dimension i
    with i + rotated/2. Putting the even rows of each head first, then the odd ones, makes the
    second compute what the first does: queries and keys are permuted alike, so their products stay.

    Args:
        tensor: [heads · head_dim, hidden] or [heads · head_dim].
        head_dim: rows per head.
        rotated: leading dimensions of each head that are rotated; None for all.
    """
    rotated = head_dim if rotated is None else rotated
    within = [*range(0, rotated, 2), *range(1, rotated, 2), *range(rotated, head_dim)]
    heads = tensor.spec.shape[0] // head_dim
    return permuted(tensor, [head * head_dim + i for head in range(heads) for i in within])


def interleaved(
    tensor: PlannedTensor, head_dim: int, rotated: int, *, leading: bool = False
) -> PlannedTensor:
    """Return a projection for rotary embeddings of neighbouring dimensions: `half_split` undone.

    Args:
        tensor: [heads · head_dim, …], rotated in two halves.
        head_dim: rows per head.
        rotated: dimensions at the end of each head that are rotated.
        leading: they are at its beginning.
    """
    first, half = 0 if leading else head_dim - rotated, rotated // 2
    turned = [first + i + j * half for i in range(half) for j in range(2)]
    within = [*range(first), *turned, *range(first + rotated, head_dim)]
    heads = tensor.spec.shape[0] // head_dim
    return permuted(tensor, [head * head_dim + i for head in range(heads) for i in within])

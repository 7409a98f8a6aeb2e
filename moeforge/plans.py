"""Owns the plan: for every output tensor, the expression that makes it. Data only.

An output tensor never needs another output tensor, so there is no schedule and no task graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

from moeforge.errors import Finding
from moeforge.expressions import (
    Affine,
    Columns,
    Concat,
    Dequantize,
    Expr,
    Fill,
    Gather,
    Lora,
    Merge,
    Noise,
    Read,
    Rows,
    RowTable,
    Same,
    Shaped,
    Transpose,
    dump,
    inputs,
    walk,
)
from moeforge.shown import Shown
from moeforge.sources import Source
from moeforge.tensors import FLOAT32, DType, TensorSpec, promote
from moeforge.vocabulary.change import TokenizerChange

__all__ = [
    "ROUTERS",
    "Affine",
    "Columns",
    "Concat",
    "Dequantize",
    "Experts",
    "Expr",
    "Fill",
    "Gather",
    "Lora",
    "Merge",
    "Noise",
    "Plan",
    "PlannedTensor",
    "Read",
    "RowTable",
    "Rows",
    "Same",
    "Shaped",
    "Transpose",
    "dump",
    "inputs",
    "pieces",
    "walk",
]


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output."""

    name: str
    spec: TensorSpec
    expr: Expr


@dataclass(frozen=True)
class Experts:
    """What a plan says of a mixture of experts.

    Attributes:
        family: entry of the families shelf, or "remote".
        base: name of the model that everything else comes from.
        labels: name of each expert.
        per_token: experts that each token passes through.
        gate_mode: entry of the gates shelf.
        routers: name of the router weight of each layer with experts, read from source ROUTERS.
        layers: numbers of these layers.
        parameters: parameters of all experts together; the rest is always active.
        shared: name of each shared expert.
        shared_gates: name of each gate [1, hidden] on the shared expert that it makes, if any.
        biases: name of each selection bias that it makes, if any.
        considered: for each home that was thought of, its name and why it was taken or not.
    """

    family: str
    base: str
    labels: tuple[str, ...]
    per_token: int
    gate_mode: str
    routers: tuple[str, ...]
    layers: tuple[int, ...]
    parameters: int
    shared: tuple[str, ...] = ()
    shared_gates: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    considered: tuple[tuple[str, str], ...] = ()


ROUTERS = "routers"
"""Key of the source that holds the router weights; it exists once the gates are computed."""


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """Everything about an output but its bytes.

    Attributes:
        kind: "moe", "stack", "merge", "extraction" or "regrouping".
        tensors: the output, in the order in which it is written.
        config: its config.json.
        sources: the checkpoints that expressions read, by key.
        donor: the one whose tokenizer and other small files the output gets.
        tokenizer: how the tokenizer differs from the donor's; None if it does not.
        experts: None unless it is a mixture of experts.
        left_out: input tensors that knowingly have no place, with the reason; others are read.
        notes: what is worth knowing, and no error.
        code: files of program text that belong to the output, by name.
        idle: parameters that a token passes by, where a mixture goes in and a mixture comes out.
    """

    kind: str
    tensors: tuple[PlannedTensor, ...]
    config: dict[str, Any]
    sources: Mapping[str, Source]
    donor: Source
    experts: Experts | None = None
    tokenizer: TokenizerChange | None = None
    left_out: Mapping[Read, str] = field(default_factory=dict)
    notes: tuple[Finding, ...] = ()
    code: Mapping[str, str] = field(default_factory=dict)
    idle: int = 0

    @cached_property
    def parameters(self) -> int:
        """Number of parameters in the output."""
        return sum(tensor.spec.numel for tensor in self.tensors)

    @property
    def active_parameters(self) -> int:
        """Number of parameters that each token passes through."""
        if self.experts is None:
            return self.parameters - self.idle
        idle = 1 - self.experts.per_token / len(self.experts.labels)
        return self.parameters - round(self.experts.parameters * idle)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(tensor.spec.nbytes for tensor in self.tensors)

    @cached_property
    def bytes_read(self) -> int:
        """Bytes read from checkpoints to write the tensors once, routers apart."""
        return sum(self._bytes_of(tensor.expr) for tensor in self.tensors)

    def _bytes_of(self, expr: Expr, rows: int | None = None) -> int:
        """Return the bytes that are read to make `rows` rows of `expr`, or all of it."""
        if isinstance(expr, Read):
            if expr.source == ROUTERS:
                return 0
            spec = self.sources[expr.source].specs()[expr.name]
            return spec.nbytes if rows is None else rows * spec.nbytes // max(spec.shape[0], 1)
        if isinstance(expr, Rows):
            return self._bytes_of(expr.whole, expr.count if rows is None else rows)
        if isinstance(expr, Shaped) and rows is not None:
            shape = self.shape(expr.input)
            rows = rows * prod(expr.shape[1:]) // max(prod(shape[1:]), 1)
        elif not isinstance(expr, (Merge, Same, Affine, Columns, Noise)):
            rows = None  # of the inputs of the others not the same rows are read
        return sum(self._bytes_of(child, rows) for child in inputs(expr))

    @cached_property
    def bytes_copied(self) -> int:
        """Bytes of the output that are copied as they are, without arithmetic."""
        return sum(
            spec.nbytes
            for tensor in self.tensors
            for expr, spec in pieces(tensor)
            if self.is_copy(expr, spec.dtype)
        )

    def is_copy(self, expr: Expr, dtype: DType) -> bool:
        """Say whether `expr` stored as `dtype` is the bytes of an input file."""
        found = self.origin(expr)
        if found is None or found[0].source == ROUTERS:
            return False
        return self.sources[found[0].source].specs()[found[0].name].dtype == dtype

    def origin(self, expr: Expr) -> tuple[Read, int] | None:
        """Return the tensor that `expr` is rows of, and their first element; None for others."""
        if isinstance(expr, Read):
            return expr, 0
        if isinstance(expr, Shaped):
            return self.origin(expr.input)
        if not isinstance(expr, Rows) or (found := self.origin(expr.whole)) is None:
            return None
        return found[0], found[1] + expr.first * prod(self.shape(expr)[1:])

    def shape(self, expr: Expr) -> tuple[int, ...]:
        """Return the shape of `expr`, which is neither a `Concat` nor a `Fill`."""
        if isinstance(expr, Read):
            return self.sources[expr.source].specs()[expr.name].shape
        if isinstance(expr, Shaped):
            return expr.shape
        shape = self.shape(inputs(expr)[0])
        if isinstance(expr, Rows):
            assert 0 <= expr.first <= expr.first + expr.count <= shape[0], "planners stay inside"
            return (expr.count, *shape[1:])
        if isinstance(expr, Columns):
            columns = sum(self.shape(child)[-1] for child in expr.inputs)
            assert columns <= expr.width, "planners make room for all columns"
            return (*shape[:-1], expr.width)
        if isinstance(expr, Transpose):
            return shape[::-1]
        if isinstance(expr, Gather):
            return (len(expr.table.source) + expr.table.padding, *shape[1:])
        return shape

    def working_dtype(self, expr: Expr, dtype: DType = FLOAT32) -> DType:
        """Return the dtype of arithmetic on `expr`: float64 if an input or the result is.

        Args:
            expr: what is computed.
            dtype: what it is stored as.
        """
        reads = [part for part in walk(expr) if isinstance(part, Read) and part.source != ROUTERS]
        stored = [self.sources[part.source].specs()[part.name].dtype for part in reads]
        return promote(d for d in (*stored, dtype, FLOAT32) if d.mergeable)


def pieces(tensor: PlannedTensor) -> tuple[tuple[Expr, TensorSpec], ...]:
    """Return the parts of `tensor` that lie one after the other in its bytes."""
    if isinstance(tensor.expr, Concat):
        return tensor.expr.pieces
    return ((tensor.expr, tensor.spec),)

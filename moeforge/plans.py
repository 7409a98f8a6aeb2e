"""Owns the plan: for every output tensor, the expression that makes it. Data only.

An output tensor never needs another output tensor, so there is no schedule and no task graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from moeforge.errors import Finding
from moeforge.sources import Source
from moeforge.tensors import FLOAT32, DType, TensorSpec, promote


@dataclass(frozen=True)
class Read:
    """Tensor `name` of source `source`, as it is."""

    source: str
    name: str


@dataclass(frozen=True)
class Merge:
    """Inputs of one shape put through a merge method.

    Attributes:
        method: entry of the methods shelf.
        inputs: expressions in the order of the recipe; a base that the method treats as one is
            first.
        params: shared parameters by name; per-input parameters as tuples along `inputs`.
    """

    method: str
    inputs: tuple[Expr, ...]
    params: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Concat:
    """Pieces one after the other in row-major order; along the first dimension, that is."""

    pieces: tuple[tuple[Expr, TensorSpec], ...]


@dataclass(frozen=True)
class Fill:
    """One value everywhere."""

    value: float


Expr = Read | Merge | Concat | Fill


def inputs(expr: Expr) -> tuple[Expr, ...]:
    """Return the expressions that `expr` is made of."""
    if isinstance(expr, Merge):
        return expr.inputs
    if isinstance(expr, Concat):
        return tuple(piece for piece, _ in expr.pieces)
    return ()


def walk(expr: Expr) -> Iterator[Expr]:
    """Yield `expr` and everything below it."""
    yield expr
    for child in inputs(expr):
        yield from walk(child)


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
        family: entry of the families shelf.
        base: name of the model that everything else comes from.
        labels: name of each expert.
        per_token: experts that each token passes through.
        gate_mode: entry of the gates shelf.
        routers: name of each layer's router weight; read from the source ROUTERS.
        parameters: parameters of all experts together; the rest is always active.
    """

    family: str
    base: str
    labels: tuple[str, ...]
    per_token: int
    gate_mode: str
    routers: tuple[str, ...]
    parameters: int


ROUTERS = "routers"
"""Key of the source that holds the router weights; it exists once the gates are computed."""


@dataclass(frozen=True)
class Plan:
    """Everything about an output but its bytes.

    Attributes:
        kind: "moe", "stack" or "merge".
        tensors: the output, in the order in which it is written.
        config: its config.json.
        sources: the checkpoints that expressions read, by key.
        donor: the one whose tokenizer and other small files the output gets.
        experts: None unless it is a mixture of experts.
        left_out: input tensors that knowingly have no place, with the reason.
        notes: what is worth knowing, and no error.
    """

    kind: str
    tensors: tuple[PlannedTensor, ...]
    config: dict[str, Any]
    sources: Mapping[str, Source]
    donor: Source
    experts: Experts | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[Finding, ...] = ()

    @cached_property
    def parameters(self) -> int:
        """Number of parameters in the output."""
        return sum(tensor.spec.numel for tensor in self.tensors)

    @property
    def active_parameters(self) -> int:
        """Number of parameters that each token passes through."""
        if self.experts is None:
            return self.parameters
        idle = 1 - self.experts.per_token / len(self.experts.labels)
        return self.parameters - round(self.experts.parameters * idle)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(tensor.spec.nbytes for tensor in self.tensors)

    @cached_property
    def bytes_read(self) -> int:
        """Bytes read from checkpoints to write the tensors once, routers apart."""
        return sum(
            self.sources[part.source].specs()[part.name].nbytes
            for tensor in self.tensors
            for part in walk(tensor.expr)
            if isinstance(part, Read) and part.source != ROUTERS
        )

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
        if not isinstance(expr, Read) or expr.source == ROUTERS:
            return False
        return self.sources[expr.source].specs()[expr.name].dtype == dtype

    def working_dtype(self, expr: Expr) -> DType:
        """Return the dtype of arithmetic on `expr`: float64 if any input is, else float32."""
        reads = [part for part in walk(expr) if isinstance(part, Read) and part.source != ROUTERS]
        stored = [self.sources[part.source].specs()[part.name].dtype for part in reads]
        return promote([*stored, FLOAT32])


def pieces(tensor: PlannedTensor) -> tuple[tuple[Expr, TensorSpec], ...]:
    """Return the parts of `tensor` that lie one after the other in its bytes."""
    if isinstance(tensor.expr, Concat):
        return tensor.expr.pieces
    return ((tensor.expr, tensor.spec),)


def dump(expr: Expr) -> Any:
    """Return `expr` as plain data for JSON."""
    if isinstance(expr, Read):
        return {"read": [expr.source, expr.name]}
    if isinstance(expr, Fill):
        return {"fill": expr.value}
    if isinstance(expr, Concat):
        return {"concat": [dump(piece) for piece, _ in expr.pieces]}
    merge: dict[str, Any] = {"merge": expr.method, "inputs": [dump(i) for i in expr.inputs]}
    merge.update(dict(expr.params))
    return merge

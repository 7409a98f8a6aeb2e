"""Owns the plan: for every output tensor, the expression that makes it. Data only.

An output tensor never needs another output tensor, so there is no schedule and no task graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, ClassVar

from moeforge.errors import Finding
from moeforge.sources import Source
from moeforge.tensors import FLOAT32, DType, TensorSpec, promote
from moeforge.vocabulary.change import TokenizerChange


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


@dataclass(frozen=True)
class Same:
    """The first of `inputs` as it is; all must be equal, byte for byte. For integer buffers."""

    inputs: tuple[Expr, ...]


@dataclass(frozen=True)
class Lora:
    """A matrix with a low-rank adapter applied: W + scale·B·A, all in float32.

    Source: Hu et al., "LoRA", arXiv 2106.09685; with `magnitude`, Liu et al., "DoRA",
    arXiv 2402.09353: the rows of the result are rescaled to the lengths in `magnitude`.

    Attributes:
        weight: W, [out, in]; with `transposed` [in, out].
        a: A, [rank, in].
        b: B, [out, rank].
        scale: factor on the product, alpha/rank or alpha/√rank.
        transposed: W is stored the other way round, so that (B·A)ᵀ is added: GPT-2's Conv1D
            (`fan_in_fan_out`), and embeddings [vocabulary, hidden] with A [rank, vocabulary].
        magnitude: DoRA's lengths, one for each output; None for plain LoRA.
    """

    weight: Expr
    a: Read
    b: Read
    scale: float
    transposed: bool = False
    magnitude: Read | None = None


@dataclass(frozen=True)
class Dequantize:
    """Float8 codes times their scales, in float32.

    Attributes:
        codes: float8 matrix [rows, columns].
        scale: one factor for each block of the matrix: its shape is that of `codes` divided by
            the block's, rounded up; one element for the whole matrix.
    """

    codes: Read
    scale: Read


@dataclass(frozen=True, eq=False)
class RowTable:
    """Where each row of a gathered matrix comes from; compared by identity.

    Attributes:
        source: for each row, index of the input it is taken from; ZERO for a row of zeros, MEAN
            for the mean of several rows. An integer array [rows].
        row: for each row, its number in that input; for MEAN rows the index into `means`. An
            integer array [rows].
        means: (input, row) pairs whose mean a MEAN row is.
        padding: rows after these, each the mean of all rows before.
    """

    source: Any
    row: Any
    means: tuple[tuple[tuple[int, int], ...], ...] = ()
    padding: int = 0

    ZERO: ClassVar[int] = -1
    MEAN: ClassVar[int] = -2


@dataclass(frozen=True)
class Gather:
    """Rows of `inputs` put together anew: embeddings and heads of another vocabulary.

    Attributes:
        inputs: tensors [rows, …] that agree in everything but the number of rows.
        table: where each row comes from.
    """

    inputs: tuple[Expr, ...]
    table: RowTable


@dataclass(frozen=True)
class Rows:
    """`count` rows of `whole` from row `first` on: a part of a fused projection.

    Rows of a `Read` are a byte range, copied as it is.
    """

    whole: Expr
    first: int
    count: int


@dataclass(frozen=True)
class Affine:
    """scale·x + shift, element by element, of `input`."""

    input: Expr
    scale: float = 1.0
    shift: float = 0.0


@dataclass(frozen=True)
class Columns:
    """Matrices [rows, …] side by side, then columns of zeros up to `width` in all."""

    inputs: tuple[Expr, ...]
    width: int


@dataclass(frozen=True)
class Transpose:
    """Matrix `input` the other way round."""

    input: Expr


_Leaf = Read | Fill
Expr = (
    _Leaf | Merge | Concat | Same | Lora | Dequantize | Gather | Rows | Affine | Columns | Transpose
)


def inputs(expr: Expr) -> tuple[Expr, ...]:
    """Return the expressions that `expr` is made of."""
    if isinstance(expr, (Merge, Same, Gather, Columns)):
        return expr.inputs
    if isinstance(expr, (Affine, Transpose)):
        return (expr.input,)
    if isinstance(expr, Rows):
        return (expr.whole,)
    if isinstance(expr, Concat):
        return tuple(piece for piece, _ in expr.pieces)
    if isinstance(expr, Lora):
        adapter = (expr.a, expr.b)
        return (expr.weight, *adapter, *((expr.magnitude,) if expr.magnitude else ()))
    if isinstance(expr, Dequantize):
        return (expr.codes, expr.scale)
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


@dataclass(frozen=True)
class Plan:
    """Everything about an output but its bytes.

    Attributes:
        kind: "moe", "stack" or "merge".
        tensors: the output, in the order in which it is written.
        config: its config.json.
        sources: the checkpoints that expressions read, by key.
        donor: the one whose tokenizer and other small files the output gets.
        tokenizer: how the tokenizer differs from the donor's; None if it does not.
        experts: None unless it is a mixture of experts.
        left_out: input tensors that knowingly have no place, with the reason; others are read.
        notes: what is worth knowing, and no error.
        code: files of program text that belong to the output, by name.
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
        if not isinstance(expr, (Merge, Same, Affine, Columns)):
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
        if not isinstance(expr, Rows) or (found := self.origin(expr.whole)) is None:
            return None
        return found[0], found[1] + expr.first * prod(self.shape(expr)[1:])

    def shape(self, expr: Expr) -> tuple[int, ...]:
        """Return the shape of `expr`, which is neither a `Concat` nor a `Fill`."""
        if isinstance(expr, Read):
            return self.sources[expr.source].specs()[expr.name].shape
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


def dump(expr: Expr) -> Any:
    """Return `expr` as plain data for JSON."""
    if isinstance(expr, Read):
        return {"read": [expr.source, expr.name]}
    if isinstance(expr, Fill):
        return {"fill": expr.value}
    below = [dump(child) for child in inputs(expr)]
    if isinstance(expr, Merge):
        return {"merge": expr.method, "inputs": below, **dict(expr.params)}
    if isinstance(expr, Gather):
        return {"gather": below, "rows": len(expr.table.source) + expr.table.padding}
    if isinstance(expr, Lora):
        lora = {"lora": below, "scale": expr.scale}
        return {**lora, "transposed": expr.transposed, "dora": expr.magnitude is not None}
    if isinstance(expr, Rows):
        return {"rows": [expr.first, expr.first + expr.count], "of": below[0]}
    if isinstance(expr, Affine):
        return {"affine": below[0], "scale": expr.scale, "shift": expr.shift}
    if isinstance(expr, Columns):
        return {"columns": below, "width": expr.width}
    if isinstance(expr, Transpose):
        return {"transpose": below[0]}
    return {type(expr).__name__.lower(): below}

"""Owns expressions: what an output tensor is made of, as frozen data.

Knows no file, no shape of a stored tensor, and not how any of them is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from moeforge.tensors import TensorSpec


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


@dataclass(frozen=True)
class Shaped:
    """The elements of `input` in another shape, in the same order: a stack as rows of a matrix.

    Of a `Read` they are its bytes, copied as they are.
    """

    input: Expr
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Noise:
    """input + scale·z, with z drawn from the standard normal distribution.

    Attributes:
        input: what noise is added to.
        scale: standard deviation of the noise.
        key: what the draws follow from, with the number of the element.
    """

    input: Expr
    scale: float
    key: int


_Leaf = Read | Fill
_Moved = Gather | Rows | Columns | Transpose | Shaped
Expr = _Leaf | Merge | Concat | Same | Lora | Dequantize | Affine | Noise | _Moved


def inputs(expr: Expr) -> tuple[Expr, ...]:
    """Return the expressions that `expr` is made of."""
    if isinstance(expr, (Merge, Same, Gather, Columns)):
        return expr.inputs
    if isinstance(expr, (Affine, Transpose, Shaped, Noise)):
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
    if isinstance(expr, Noise):
        return {"noise": below[0], "scale": expr.scale, "key": expr.key}
    if isinstance(expr, Shaped):
        return {"shaped": below[0], "shape": list(expr.shape)}
    if isinstance(expr, Affine):
        return {"affine": below[0], "scale": expr.scale, "shift": expr.shift}
    if isinstance(expr, Columns):
        return {"columns": below, "width": expr.width}
    if isinstance(expr, Transpose):
        return {"transpose": below[0]}
    return {type(expr).__name__.lower(): below}

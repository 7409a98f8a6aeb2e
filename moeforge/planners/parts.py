"""Owns what a mixture is put together from: base, experts layer by layer, dtypes, padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeforge.errors import Path
from moeforge.families import Mixture
from moeforge.planners.model import Model, unused
from moeforge.plans import (
    Affine,
    Columns,
    Concat,
    Experts,
    Expr,
    Fill,
    PlannedTensor,
    Read,
    pieces,
)
from moeforge.recipe import Expert, MoeRecipe
from moeforge.sources import Source
from moeforge.tensors import BY_NAME, DType, TensorSpec

Piece = tuple[Expr, TensorSpec]


@dataclass(frozen=True)
class ExpertParts:
    """An expert, routed or shared.

    Attributes:
        entry: what the recipe says of it.
        path: where its `source_model` stands.
        label: how messages and cards call it.
        models: for each layer, the model that its MLP comes from.
    """

    entry: Expert
    path: Path
    label: str
    models: tuple[Model, ...]

    @property
    def distinct(self) -> list[Model]:
        """The models, each once."""
        return list({model.label: model for model in self.models}.values())


@dataclass(frozen=True)
class Parts:
    """Everything that a mixture is made of, known to fit together.

    Attributes:
        recipe: the recipe.
        base: what everything but the MLPs comes from.
        experts: the routed experts.
        shared: the shared ones.
        mixture: what is wanted; `width` and `shared` are those of the output.
        considered: for each home that was thought of, its name and why it was taken or not.
    """

    recipe: MoeRecipe
    base: Model
    experts: tuple[ExpertParts, ...]
    shared: tuple[ExpertParts, ...]
    mixture: Mixture
    considered: tuple[tuple[str, str], ...]

    @property
    def dtype(self) -> DType | None:
        """Dtype of the output; None keeps the base's, tensor by tensor."""
        return BY_NAME[self.recipe.dtype] if self.recipe.dtype else None

    def cast(self, tensor: PlannedTensor) -> PlannedTensor:
        """Return `tensor` in the dtype of the output."""
        return cast(tensor, self.dtype)

    def experts_of(self, family: str, routers: Sequence[str], parameters: int) -> Experts:
        """Return what the plan says of the mixture."""
        return Experts(
            family,
            self.base.label,
            tuple(expert.label for expert in self.experts),
            self.recipe.experts_per_token,
            self.recipe.gate_mode,
            tuple(routers),
            tuple(layer for layer, sparse in enumerate(self.mixture.sparse) if sparse),
            parameters,
            tuple(expert.label for expert in self.shared),
            considered=self.considered,
        )

    def inputs(self) -> list[Model]:
        """Return every model that takes part, the base first."""
        found = {self.base.label: self.base}
        for expert in (*self.experts, *self.shared):
            for model in expert.models:
                found.setdefault(model.label, model)
        return list(found.values())

    def sources(self) -> dict[str, Source]:
        """Return every source that the inputs read, by key."""
        return {key: source for model in self.inputs() for key, source in model.sources.items()}

    def left_out(self, tensors: Sequence[PlannedTensor]) -> dict[Read, str]:
        """List what the inputs have and the mixture knowingly does not use."""
        left: dict[Read, str] = {}
        for model, read in unused(self.inputs(), tensors):
            replaced = model is self.base
            why = "the experts' MLPs take its place" if replaced else "comes from the base"
            left.setdefault(read, why)
        for model in self.inputs():
            left.update(model.left_out)
        return left


def scaled(tensor: PlannedTensor, factor: float) -> PlannedTensor:
    """Return factor·tensor."""
    if factor == 1.0:
        return tensor
    return PlannedTensor(tensor.name, tensor.spec, Affine(tensor.expr, factor))


def cast(tensor: PlannedTensor, dtype: DType | None) -> PlannedTensor:
    """Return a tensor in `dtype`; as it is where that is None, or where it holds no floats."""
    if dtype is None or not tensor.spec.dtype.mergeable:
        return tensor
    expr = tensor.expr
    if isinstance(expr, Concat):
        expr = Concat(tuple((part, TensorSpec(dtype, spec.shape)) for part, spec in expr.pieces))
    return PlannedTensor(tensor.name, TensorSpec(dtype, tensor.spec.shape), expr)


def padded_rows(tensor: PlannedTensor, dtype: DType, rows: int) -> list[Piece]:
    """Return the pieces of a matrix in `dtype` that zeros fill up to `rows` rows."""
    made = [(expr, TensorSpec(dtype, spec.shape)) for expr, spec in pieces(tensor)]
    missing = rows - tensor.spec.shape[0]
    if missing > 0:
        made.append((Fill(0.0), TensorSpec(dtype, (missing, *tensor.spec.shape[1:]))))
    return made


def side_by_side(tensors: Sequence[PlannedTensor], dtype: DType, width: int) -> list[Piece]:
    """Return matrices side by side, and zeros up to `width` columns, as one piece in `dtype`."""
    if len(tensors) == 1 and tensors[0].spec.shape[1] == width:
        return padded_rows(tensors[0], dtype, tensors[0].spec.shape[0])
    expr = Columns(tuple(tensor.expr for tensor in tensors), width)
    return [(expr, TensorSpec(dtype, (tensors[0].spec.shape[0], width)))]


def joined(name: str, parts: Sequence[Piece], shape: tuple[int, ...]) -> PlannedTensor:
    """Return tensor `name` of `shape` whose bytes are those of `parts`."""
    (expr, spec), *others = parts
    spec = TensorSpec(spec.dtype, shape)
    return PlannedTensor(name, spec, Concat(tuple(parts)) if others else expr)

"""Owns finding routed experts that bring nothing of their own: MLPs that another one has, too.

Knows expressions and where bytes lie; reads no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

from moeforge.planners.model import Findings, Model
from moeforge.planners.parts import ExpertParts, Parts
from moeforge.plans import PlannedTensor, Read
from moeforge.sources import lies

MlpOf = Callable[[Model, int], Mapping[str, PlannedTensor]]
"""(model, layer) -> the tensors of its MLP there, by their names within it."""

_ADAPTER = (
    "Train the adapter with the MLP's projections among its target_modules, or give it to the "
    "base: a mixture takes nothing but MLPs from its experts."
)
_MODEL = "Leave it out, or give a model that was trained: of experts nothing but MLPs is taken."


def warn_of_copies(parts: Parts, mlp_of: MlpOf, notes: Findings) -> None:
    """Warn of experts whose MLPs are those of the base, or of an expert before, by another name.

    An adapter that changes attention alone makes such an expert, and so does one file under two
    names. The same name twice is meant so: copies that are to be trained are given like that.
    """
    layers = [layer for layer, sparse in enumerate(parts.mixture.sparse) if sparse]
    base = parts.base
    seen = {_made([(base, layer) for layer in layers], mlp_of): (base.label, "the base")}
    for number, expert in enumerate(parts.experts):
        if expert.entry.noise_scale or expert.entry.residual_scale != 1.0:
            continue
        first = (expert.label, f"expert {number}")
        places = [(expert.models[layer], layer) for layer in layers]
        label, what = seen.setdefault(_made(places, mlp_of), first)
        if label != expert.label:
            said = f"{expert.label} has the same MLPs as {label}: as an expert it is {what} again"
            notes.warn(said, _ADAPTER if _adapted(expert) else _MODEL, expert.path)


def _adapted(expert: ExpertParts) -> bool:
    sources = (source for model in expert.distinct for source in model.sources.values())
    return any("peft_type" in source.config for source in sources)


def _made(places: list[tuple[Model, int]], mlp_of: MlpOf) -> Hashable:
    """Return what MLPs are made of; equal for those that are the same bytes."""
    return tuple(
        (name, _bytes(model, tensor))
        for model, layer in places
        for name, tensor in sorted(mlp_of(model, layer).items())
    )


def _bytes(model: Model, tensor: PlannedTensor) -> Hashable:
    """Return where a tensor's bytes lie, by the file itself: it may have several names.

    Of one that is computed, or not here yet, what it is made of.
    """
    made = tensor.expr
    span = lies(model.sources[made.source], made.name) if isinstance(made, Read) else None
    if span is None or not span.path.exists():
        return made
    file = span.path.stat()
    return file.st_dev, file.st_ino, span.offset

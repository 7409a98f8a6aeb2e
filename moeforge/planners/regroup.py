"""Owns mixtures with some of their own experts: which stay, in which order, with which router rows.

Every tensor is copied: a kept expert keeps its weights, its row of the router and its biases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from moeforge.configs import Config, portable
from moeforge.errors import Path
from moeforge.planners.model import HEAD, Findings, Model, natural, reads
from moeforge.planners.parts import cast
from moeforge.planners.unmixed import COUNTS, INNER, PER_TOKEN, Unmixed, flat, unmixed
from moeforge.plans import Concat, PlannedTensor, Rows, Shaped
from moeforge.recipe import RegroupRecipe
from moeforge.tensors import BY_NAME, TensorSpec

Resolve = Callable[[Any, Path], "Model | None"]
_PER_EXPERT = ("per_expert_scale",)
"""Ends of names of vectors with one element for each expert, beside the family's bias."""


def plan_regroup(
    recipe: RegroupRecipe, resolve: Resolve, path: Path, findings: Findings
) -> Model | None:
    """Plan a mixture with some of its experts; None where something was found wrong."""
    asked, path = recipe.regroup, (*path, "regroup")
    model = resolve(asked.model, (*path, "model"))
    mixed = unmixed(model, findings, (*path, "model")) if model else None
    if mixed is None:
        return None
    keep = _kept(mixed, asked.keep, findings, (*path, "keep"))
    per_token = asked.experts_per_token or mixed.per_token
    if keep is None or not _possible(mixed, len(keep[0]), per_token, findings, path):
        return None
    dtype = BY_NAME[recipe.dtype] if recipe.dtype else None
    made = (cast(tensor, dtype) for tensor in _tensors(mixed, keep))
    tensors = {tensor.name: tensor for tensor in sorted(made, key=lambda t: natural(t.name))}
    used = {read for tensor in tensors.values() for read in reads(tensor)}
    every = {read for tensor in mixed.model.tensors.values() for read in reads(tensor)}
    left = dict.fromkeys(every - used, "experts that are not kept")
    config = portable(
        _config(mixed.model.config, len(keep[0]), per_token), dtype.name if dtype else None
    )
    config["tie_word_embeddings"] = HEAD not in tensors
    return replace(
        mixed.model,
        label=f"experts of {mixed.model.label}",
        config=config,
        tensors=tensors,
        left_out={**mixed.model.left_out, **left},
    )


def _kept(
    mixed: Unmixed, keep: tuple[Any, ...], findings: Findings, path: Path
) -> list[tuple[int, ...]] | None:
    """Return the experts that each layer with experts keeps; None after reporting what is wrong."""
    count = len(mixed.layers)
    lists = list(keep) if isinstance(keep[0], tuple) else [keep] * count
    if len(lists) != count:
        what = f"there are {len(lists)} lists, and {count} layers of {mixed.model.label} have"
        findings.error(f"{what} experts", "Give one list for each of them, or one for all.", path)
        return None
    if beyond := sorted({number for each in lists for number in each if number >= mixed.experts}):
        what = f"{mixed.model.label} has {mixed.experts} experts, and {beyond[0]} is to be kept"
        findings.error(what, f"Valid: 0 to {mixed.experts - 1}.", path)
        return None
    return lists


def _possible(mixed: Unmixed, experts: int, per_token: int, findings: Findings, path: Path) -> bool:
    """Say whether the architecture can have so many experts; report why not."""
    before, config = len(findings), mixed.config
    if per_token > experts:
        what = f"each token passes through {per_token} experts, and only {experts} stay"
        fix = f"Keep more, or lower experts_per_token to {experts} or less (--top-k)."
        findings.error(what, fix, path)
    groups = config.get("n_group") or 1
    if groups != 1:
        what = f"{mixed.model.label} chooses experts within {groups} groups (n_group)"
        findings.error(what, "The groups would no longer be the ones it was trained with.", path)
    # Each group is scored by its two best.
    if mixed.family.selection_bias and "n_group" in config and experts < 2:
        what = f"the router of {mixed.family.model_type} compares the two best experts"
        findings.error(what, "Keep two, or take a dense model out (moeforge extract).", path)
    return len(findings) == before


def _tensors(mixed: Unmixed, keep: Sequence[tuple[int, ...]]) -> Iterator[PlannedTensor]:
    """Yield everything that the mixture has then."""
    taken: set[str] = set()
    for layer, numbers in zip(mixed.layers, keep, strict=True):
        for old, new in _layer(mixed, layer, numbers):
            taken.update(old)
            yield from new
    yield from (t for name, t in mixed.model.tensors.items() if name not in taken)


def idle(model: Model) -> int:
    """Return how many parameters of a mixture each token passes by."""
    mixed = unmixed(model, Findings(), ())
    assert mixed is not None, "it was planned as one"
    every = range(mixed.experts)
    parts = ((layer, n, part) for layer in mixed.layers for n in every for part in mixed.family.mlp)
    total = sum(mixed.expert(*place).spec.numel for place in parts)
    return total * (mixed.experts - mixed.per_token) // mixed.experts


Step = tuple[list[str], list[PlannedTensor]]


def _layer(mixed: Unmixed, layer: int, keep: tuple[int, ...]) -> Iterator[Step]:
    """Yield names of a layer's tensors that are replaced, and what replaces them."""
    family, tensors = mixed.family, mixed.model.tensors
    bias = (family.selection_bias,) if family.selection_bias else ()
    scales = (template for template in family.sparse_fills if template.endswith(_PER_EXPERT))
    for template in (family.router, *bias, *scales):
        name = template.format(layer=layer)
        if name in tensors:
            yield [name], [_picked(tensors[name], mixed.experts, keep)]
    for template in family.experts:
        if "{expert}" not in template:
            name = template.format(layer=layer)
            yield [name], [_picked(tensors[name], mixed.experts, keep)]
            continue
        old = [template.format(layer=layer, expert=n) for n in range(mixed.experts)]
        new = [template.format(layer=layer, expert=n) for n in range(len(keep))]
        chosen = (tensors[old[number]] for number in keep)
        made = (replace(tensor, name=name) for name, tensor in zip(new, chosen, strict=True))
        yield old, list(made)


def _picked(tensor: PlannedTensor, experts: int, keep: tuple[int, ...]) -> PlannedTensor:
    """Return the parts of `keep` of a tensor that is made of equal parts for each expert."""
    shape, dtype = tensor.spec.shape, tensor.spec.dtype
    matrix = flat(tensor)
    if shape[0] == 1 and len(shape) == 2 and experts > 1:  # Ernie's bias [1, experts]
        matrix = replace(tensor, expr=Shaped(tensor.expr, (experts, 1)))
        wanted: tuple[int, ...] = (1, len(keep))
        each, rest = 1, tuple[int, ...]((1,))
    else:
        each, rest = prod(matrix.spec.shape[:1]) // experts, matrix.spec.shape[1:]
        wanted = (shape[0] // experts * len(keep), *shape[1:])
    spec = TensorSpec(dtype, (each, *rest))
    parts = tuple((Rows(matrix.expr, number * each, each), spec) for number in keep)
    return PlannedTensor(tensor.name, TensorSpec(dtype, wanted), Concat(parts))


def _config(config: Config, experts: int, per_token: int) -> Config:
    """Return the config of a mixture with so many experts."""
    if isinstance(config.get(INNER), dict):
        return {**config, INNER: _config(config[INNER], experts, per_token)}
    changes = {key: experts for key in COUNTS if isinstance(config.get(key), int)}
    return {**config, **changes, **{key: per_token for key in PER_TOKEN if key in config}}

"""Owns taking a dense model out of a mixture: one expert's MLPs, or the average of all experts'.

The result is the mixture in which that expert alone is left: its weight is then 1 for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from moeforge.configs import Config, portable
from moeforge.errors import Path
from moeforge.families import Mixture
from moeforge.families._inverse import DENSE, MIXTURES_ONLY, NONE, Dense
from moeforge.planners.homes import in_words_of, objection
from moeforge.planners.model import EMBEDDINGS, HEAD, Findings, Model, listing, natural, reads
from moeforge.planners.parts import Piece, cast, joined, padded_rows, scaled, side_by_side
from moeforge.planners.unmixed import DOWN, Unmixed, unmixed
from moeforge.planners.values import Unread, all_equal
from moeforge.plans import Merge, PlannedTensor, Read
from moeforge.recipe import AVERAGE, ExtractRecipe
from moeforge.tensors import BY_NAME, DType

Resolve = Callable[[Any, Path], "Model | None"]
_ONE = {"float32": b"\x00\x00\x80\x3f", "bfloat16": b"\x80\x3f", "float16": b"\x00\x3c"}
_GATED = (
    "its shared expert is weighed by a gate, for each token by another number, which no dense MLP "
    "does"
)


@dataclass(frozen=True)
class _Wanted:
    """What is to be made of a mixture.

    Attributes:
        mixed: the mixture.
        expert: number of the expert; None for the average of all.
        dense: the type of the result.
        shared: whether there are shared experts that do something; they become part of every MLP.
        dtype: of the result; None keeps the tensors' own.
    """

    mixed: Unmixed
    expert: int | None
    dense: Dense
    shared: bool
    dtype: DType | None

    @property
    def label(self) -> str:
        """How messages call the result."""
        return f"{self.mixed.model.label}[{AVERAGE if self.expert is None else self.expert}]"


def plan_extract(
    recipe: ExtractRecipe, resolve: Resolve, path: Path, findings: Findings, notes: Findings
) -> Model | None:
    """Plan a dense model out of a mixture; None where something was found wrong."""
    asked, path = recipe.extract, (*path, "extract")
    model = resolve(asked.model, (*path, "model"))
    mixed = unmixed(model, findings, (*path, "model")) if model else None
    if mixed is None:
        return None
    number = None if asked.expert == AVERAGE else int(asked.expert)
    if number is not None and number >= mixed.experts:
        what = f"{mixed.model.label} has {mixed.experts} experts, and {number} is asked for"
        findings.error(what, f"Valid: 0 to {mixed.experts - 1}.", (*path, "expert"))
        return None
    types = [dense.model_type for dense in DENSE.get(mixed.family.model_type, ())]
    if asked.model_type and types and asked.model_type not in types:
        what = f"an expert of {mixed.model.label} makes no {asked.model_type} model"
        fix = f"Take {' or '.join(types)}, or leave it out (--as)."
        findings.error(what, fix, (*path, "model_type"))
        return None
    try:
        reason = _refusal(mixed)
        shared = _shared_does_something(mixed)
        dense, why_not = _choose(mixed, asked.model_type)
    except Unread as error:
        fix = "Download it, and give the folder."
        findings.error(f"{mixed.model.label}: {error}", fix, (*path, "model"))
        return None
    if shared and mixed.family.shared and mixed.family.shared.gate:
        reason = reason or _GATED
    if reason or dense is None:
        what = f"no dense model is what an expert of {mixed.model.label} is in its mixture: "
        fix = "`moeforge experts` makes mixtures of fewer experts, which is always possible."
        findings.error(what + (reason or why_not), fix, (*path, "model"))
        return None
    dtype = BY_NAME[recipe.dtype] if recipe.dtype else None
    wanted = _Wanted(mixed, number, dense, shared, dtype)
    if shared:
        what = f"{mixed.model.label} has shared experts: every MLP is expert and shared experts"
        notes.error(f"{what} side by side, as one wider MLP", path=path)
    return _made(wanted, findings, (*path, "model"))


def _refusal(mixed: Unmixed) -> str:
    """Return why an expert of this family makes no dense model, or ""."""
    config = mixed.config
    if reason := NONE.get(mixed.family.model_type, ""):
        return reason
    if mixed.family.score == "sigmoid" and not config.get("norm_topk_prob"):
        return "the weights of its experts do not add up to one (norm_topk_prob is false)"
    strategy = config.get("shared_expert_combination_strategy", "sum")
    if config.get("num_shared_experts") and strategy != "sum":
        return f"it combines its shared experts by {strategy} (shared_expert_combination_strategy)"
    return ""


def _shared_does_something(mixed: Unmixed) -> bool:
    """Say whether there are shared experts whose down projection is not zero everywhere."""
    if mixed.family.shared is None:
        return False
    for layer in mixed.layers:
        try:
            down = mixed.mlp(mixed.family.shared.tensors, layer, DOWN)
        except KeyError:  # the family need not have any
            continue
        if not all_equal(mixed.model, down, bytes(down.spec.dtype.itemsize)):
            return True
    return False


def _choose(mixed: Unmixed, asked: str | None) -> tuple[Dense | None, str]:
    """Return the dense type of the result; None with the reasons where there is none."""
    known = DENSE.get(mixed.family.model_type, ())
    against = []
    for dense in known:
        if asked not in (None, dense.model_type):
            continue
        reason = dense.refuse(mixed.config) or _not_ones(mixed, dense)
        if not reason:
            return dense, ""
        against.append(f"{dense.model_type}: {reason}")
    return None, "; ".join(against)


def _not_ones(mixed: Unmixed, dense: Dense) -> str:
    for template in dense.ones:
        for name in dict.fromkeys(template.format(layer=n) for n in range(mixed.depth)):
            tensor = mixed.model.tensors.get(name)
            if tensor is None:
                return f"{name} is not there"
            if not all_equal(mixed.model, tensor, _ONE.get(tensor.spec.dtype.name, b"")):
                return f"{name} is not one everywhere, and this type has no such weight"
    return ""


def _made(wanted: _Wanted, findings: Findings, path: Path) -> Model | None:
    """Return the dense model; None after reporting tensors that have no place in it."""
    mixed, dense = wanted.mixed, wanted.dense
    mlps = {layer: dict(_mlp(wanted, layer)) for layer in range(mixed.depth)}
    width = max(_width(mlp[DOWN]) for mlp in mlps.values())
    config = _config(wanted, width)
    mixture = Mixture(max(mixed.experts, 2), 1, mixed.width, mixed.sparse)
    if reason := objection(mixed.family, config, mixture):
        findings.error(f"{mixed.model.label}: as {dense.model_type}: {reason}", path=path)
        return None
    own = _around(wanted, config, findings, path)
    if own is None:
        return None
    for layer, mlp in mlps.items():
        for part, made in mlp.items():
            name = f"model.layers.{layer}.mlp.{part}"
            own[name] = _as_wide(name, made, part, width)
    stored = dense.tensors(mixed.config, own)
    tensors = {tensor.name: tensor for tensor in sorted(stored.values(), key=_order)}
    used = {read for tensor in tensors.values() for read in reads(tensor)}
    dtype = wanted.dtype or own[EMBEDDINGS].spec.dtype
    config = portable(config, dtype.name)
    config["tie_word_embeddings"] = HEAD not in tensors
    return replace(
        mixed.model,
        label=wanted.label,
        config=config,
        tensors=tensors,
        left_out=_left_out(wanted, used),
    )


def _order(tensor: PlannedTensor) -> Any:
    return natural(tensor.name)


def _left_out(wanted: _Wanted, used: Collection[Read]) -> dict[Read, str]:
    """Return what of the mixture has no place in the dense model, and why."""
    mixed, left = wanted.mixed, dict[Read, str]()
    routers = {mixed.family.router.format(layer=layer) for layer in mixed.layers}
    for name, tensor in mixed.model.tensors.items():
        why = "other experts, and what is the same without them"
        if name in routers:
            why = "a dense model has no router"
        left.update((read, why) for read in reads(tensor) if read not in used)
    return {**mixed.model.left_out, **left}


# --- MLPs


def _mlp(wanted: _Wanted, layer: int) -> Iterator[tuple[str, list[PlannedTensor]]]:
    """Yield each part of a layer's MLP with the matrices that lie side by side in it."""
    mixed, family = wanted.mixed, wanted.mixed.family
    for part in family.mlp:
        if not mixed.sparse[layer]:
            made = [mixed.mlp(family.dense_mlp, layer, part)]
        else:
            made = [_expert(wanted, layer, part)]
            if wanted.shared and family.shared:
                made.append(mixed.mlp(family.shared.tensors, layer, part))
        yield part, [cast(tensor, wanted.dtype) for tensor in made]


def _expert(wanted: _Wanted, layer: int, part: str) -> PlannedTensor:
    mixed = wanted.mixed
    if wanted.expert is not None:
        made = mixed.expert(layer, wanted.expert, part)
    else:
        every = [mixed.expert(layer, number, part) for number in range(mixed.experts)]
        params = (("weight", (1.0,) * len(every)), ("normalize", True))
        mean = Merge("linear", tuple(tensor.expr for tensor in every), params)
        made = PlannedTensor(every[0].name, every[0].spec, mean)
    factor = mixed.config.get("routed_scaling_factor")
    return scaled(made, float(factor)) if part == DOWN and factor is not None else made


def _width(down: list[PlannedTensor]) -> int:
    return sum(tensor.spec.shape[1] for tensor in down)


def _as_wide(name: str, made: list[PlannedTensor], part: str, width: int) -> PlannedTensor:
    """Return matrices side by side as one, with zeros up to `width`, which change nothing."""
    dtype = made[0].spec.dtype
    if part == DOWN:
        parts = side_by_side(made, dtype, width)
    else:
        parts = [piece for tensor in made for piece in padded_rows(tensor, dtype, 0)]
        missing = width - sum(tensor.spec.shape[0] for tensor in made)
        if missing:
            last = made[-1]
            height = last.spec.shape[0] + missing
            parts = parts[:-1] + padded_rows(last, dtype, height)
    return joined(name, parts, _shape(parts))


def _shape(parts: list[Piece]) -> tuple[int, ...]:
    return (sum(spec.shape[0] for _, spec in parts), *parts[0][1].shape[1:])


# --- around them


def _around(
    wanted: _Wanted, config: Config, findings: Findings, path: Path
) -> dict[str, PlannedTensor] | None:
    """Return everything but the MLPs in the words of the family; None after reporting the rest."""
    mixed, family = wanted.mixed, wanted.mixed.family
    words = in_words_of(family, config)
    needed, allowed = set(family.outside), {*family.outside, *family.outside_optional}
    for layer in range(mixed.depth):
        prefix = f"model.layers.{layer}."
        must = {prefix + rest for rest in family.layer(words, layer)}
        needed |= must
        allowed |= must | {prefix + rest for rest in family.optional}
    on_disk = {family.rename(name): name for name in allowed}
    blocks = {name for layer in range(mixed.depth) for name in mixed.names(layer)}
    gone = {t.format(layer=n) for t in wanted.dense.ones for n in range(mixed.depth)}
    own: dict[str, PlannedTensor] = {}
    extra = []
    for stored, tensor in mixed.model.tensors.items():
        if name := on_disk.get(stored):
            own[name] = cast(replace(tensor, name=name), wanted.dtype)
        elif stored not in blocks and stored not in gone:
            extra.append(stored)
    absent = sorted(needed - own.keys(), key=natural)
    label, kind = mixed.model.label, wanted.dense.model_type
    if extra:
        what = f"a {kind} model has no place for {len(extra)} tensors of {label}: {listing(extra)}"
        findings.error(what, "No weight is dropped silently.", path)
    if absent:
        what = f"{label} lacks {len(absent)} tensors of a {kind} model: {listing(absent)}"
        findings.error(what, "Download or export it again.", path)
    return None if extra or absent else own


def _config(wanted: _Wanted, width: int) -> Config:
    """Return config.json of the dense model."""
    mixed, dense = wanted.mixed, wanted.dense
    config = {key: value for key, value in mixed.config.items() if key not in MIXTURES_ONLY}
    changes: Mapping[str, Any] = {
        "model_type": dense.model_type,
        "architectures": [dense.architecture],
        dense.width: width,
        **dense.config(mixed.config),
    }
    for name, value in changes.items():
        if value is None and name != "sliding_window":
            config.pop(name, None)
        else:
            config[name] = value
    if not config.get("head_dim"):  # dense types may have another default than their mixtures
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    return config

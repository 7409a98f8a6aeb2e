"""Owns putting a mixture together in the layout of a family: its tensors and its config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from moeforge.configs import Config, portable
from moeforge.dense import EMBEDDINGS, HEAD, complete
from moeforge.errors import Finding, SourceError
from moeforge.families import PARTS, Family, Fill, Tensors
from moeforge.methods._random import derive
from moeforge.planners.homes import Home, accept, in_words_of
from moeforge.planners.model import Findings, Model, listing, natural
from moeforge.planners.parts import (
    ExpertParts,
    Parts,
    Piece,
    joined,
    padded_rows,
    scaled,
    side_by_side,
)
from moeforge.plans import ROUTERS, Noise, Plan, PlannedTensor, Read, Transpose
from moeforge.plans import Fill as FillExpr
from moeforge.tensors import BY_NAME, DType, TensorSpec

DOWN = "down_proj.weight"
_ALWAYS = 2.0**-24
"""Element of a gate whose sigmoid is to be a half whatever the input: not zero, for llama.cpp
computes this gate as silu(x)/x."""
_UNUSED_GATE = 2.0**-10
"""Element of the gate on a shared expert of zeros."""


class Views:
    """The inputs of a mixture in the layout that its family's templates speak of, made once."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._made: dict[str, Tensors] = {}

    def __call__(self, model: Model) -> Tensors:
        """Return the tensors of `model`.

        Raises:
            SourceError: its config says other sizes than its tensors have, or too little.
        """
        if model.label not in self._made:
            taken = accept(self._family, model.config)
            try:
                self._made[model.label] = taken.tensors(complete(model.config), model.tensors)
            except ValueError as error:
                what = f"{model.label}: config.json does not fit the tensors: {error}"
                raise SourceError(Finding(what, "Download the model again.")) from error
        return self._made[model.label]


def check_base(
    parts: Parts, family: Family, views: Views, findings: Findings, path: tuple[str | int, ...]
) -> None:
    """Report tensors of the base that the family has no place for, or needs and does not find."""
    config = in_words_of(family, parts.base.config)
    needed, allowed = set(family.outside), {*family.outside, *family.outside_optional}
    for index, sparse in enumerate(parts.mixture.sparse):
        prefix = f"model.layers.{index}."
        mlp = {f"{prefix}mlp.{rest}" for rest in family.mlp}
        must = {prefix + rest for rest in family.layer(config, index)} | (set() if sparse else mlp)
        needed |= must
        allowed |= must | mlp | {prefix + rest for rest in family.optional}
    report_names(set(views(parts.base)), needed, allowed, parts.base, family, findings, path)


def check_expert(
    model: Model,
    layers: list[int],
    family: Family,
    views: Views,
    findings: Findings,
    path: tuple[str | int, ...],
) -> None:
    """Report MLP tensors that the family has no place for, or needs and does not find."""
    places = {f"model.layers.{i}.mlp.{rest}" for i in layers for rest in family.mlp}
    prefixes = tuple(f"model.layers.{i}.mlp." for i in layers)
    own = {name for name in views(model) if name.startswith(prefixes)}
    report_names(own, places, places, model, family, findings, path)


def report_names(
    own: set[str],
    needed: set[str],
    allowed: set[str],
    model: Model,
    family: Family,
    findings: Findings,
    path: tuple[str | int, ...],
) -> None:
    """Report what is not allowed, and what is needed and not there."""
    if extra := sorted(own - allowed, key=natural):
        what = f"{family.model_type} has no place for {len(extra)} tensors of {model.label}"
        fix = "No weight is dropped silently: use a model without them, or another architecture."
        findings.error(f"{what}: {listing(extra)}", fix, path)
    if absent := sorted(needed - own, key=natural):
        what = f"{model.label} lacks {len(absent)} tensors: {listing(absent)}"
        findings.error(what, "Download or export it again.", path)


class Assembly:
    """A mixture whose parts are known to fit together, in the layout of a family."""

    def __init__(self, parts: Parts, family: Family, views: Views) -> None:
        self.parts = parts
        self.family = family
        self.mixture = parts.mixture
        self.views = views
        self.base = views(parts.base)
        self.config = in_words_of(family, parts.base.config)
        self.main_dtype: DType = parts.dtype or self.base[EMBEDDINGS].spec.dtype
        self.gated = bool(family.shared and family.shared.gate)
        self.routed_gate = (
            self.gated and len(parts.shared) == 1 and bool(parts.shared[0].entry.has_prompts)
        )
        self.routed_bias = family.selection_bias if parts.recipe.gate_parameters.balanced else ""

    def plan(self, home: Home, notes: Findings) -> Plan:
        """Return the plan; `notes` go into it."""
        family, parts = self.family, self.parts
        outside = [*family.outside, *family.outside_optional]
        around = [self._renamed(self.base[name]) for name in outside if name in self.base]
        depth = len(self.mixture.sparse)
        layers = [tensor for index in range(depth) for tensor in self._layer(index)]
        first = [tensor for tensor in around if tensor.name == family.rename(EMBEDDINGS)]
        tensors = (*first, *layers, *(tensor for tensor in around if tensor not in first))
        sparse = [layer for layer in range(depth) if self.mixture.sparse[layer]]
        routers = [family.router.format(layer=layer) for layer in sparse]
        parameters = sum(
            self._expert_tensor(expert, layer, part).spec.numel
            for expert in parts.experts
            for layer in sparse
            for part in family.mlp
        )
        experts = parts.experts_of(family.model_type, routers, parameters)
        if self.routed_gate and family.shared:
            gates = tuple(family.shared.gate.format(layer=layer) for layer in sparse)
            experts = replace(experts, shared_gates=gates)
        if self.routed_bias:
            biases = tuple(self.routed_bias.format(layer=layer) for layer in sparse)
            experts = replace(experts, biases=biases)
        return Plan(
            "moe",
            tensors,
            self._written(),
            parts.sources(),
            parts.base.donor,
            experts,
            parts.base.tokenizer,
            parts.left_out(tensors),
            tuple(notes),
        )

    def _written(self) -> Config:
        """Return config.json."""
        family = self.family
        written = family.config(self.config, self.mixture)
        if family.sparse is not None:
            said = family.sparse(self.config, self.mixture)
            assert not isinstance(said, str), "it was asked before"
            written = {**written, **said}
        config = portable(self.config, self.main_dtype.name)
        config.pop("auto_map", None)  # names the code of the dense model
        config.update({"model_type": family.model_type, "architectures": [family.architecture]})
        for key, value in written.items():
            if value is None and key != "sliding_window":
                config.pop(key, None)
            else:
                config[key] = value
        if config.get("rms_norm_eps") is not None:
            config["rms_norm_eps"] = float(config["rms_norm_eps"])
        config["tie_word_embeddings"] = HEAD not in self.base
        return config

    def _renamed(self, tensor: PlannedTensor) -> PlannedTensor:
        cast = self.parts.cast(tensor)
        return PlannedTensor(self.family.rename(cast.name), cast.spec, cast.expr)

    def _layer(self, index: int) -> Iterator[PlannedTensor]:
        family, prefix = self.family, f"model.layers.{index}."
        places = dict.fromkeys((*family.layer(self.config, index), *family.optional))
        made = [self._renamed(self.base[prefix + n]) for n in places if prefix + n in self.base]
        yield from made
        taken = {tensor.name for tensor in made}
        yield from self._fills(family.fills, index, taken)
        if not self.mixture.sparse[index]:
            yield from self._dense(index)
            return
        yield from self._fills(family.sparse_fills, index, taken)
        router = family.router.format(layer=index)
        yield self._router(router, len(self.parts.experts))
        for template, names in family.experts.items():
            yield from self._experts(template, names, index)
        if family.shared and self.mixture.shared:
            yield from self._shared(index)

    def _router(self, name: str, count: int) -> PlannedTensor:
        shape = (count, int(self.config["hidden_size"]))
        return PlannedTensor(name, TensorSpec(self.main_dtype, shape), Read(ROUTERS, name))

    def _fills(
        self, fills: Mapping[str, Fill], index: int, taken: set[str]
    ) -> Iterator[PlannedTensor]:
        for template, fill in fills.items():
            name, shape = template.format(layer=index), fill.shape(self.config, self.mixture)
            dtype = BY_NAME[fill.dtype] if fill.dtype else self.main_dtype
            if shape and name not in taken:
                made = template == self.routed_bias
                expr = Read(ROUTERS, name) if made else FillExpr(fill.value)
                yield PlannedTensor(name, TensorSpec(dtype, shape), expr)

    def _dense(self, index: int) -> Iterator[PlannedTensor]:
        """Yield the MLP of a layer without experts: the base's."""
        for template, names in self.family.dense_mlp.items():
            held = [self.base[f"model.layers.{index}.mlp.{name}"] for name in names]
            parts = [
                piece
                for tensor in map(self.parts.cast, held)
                for piece in padded_rows(tensor, tensor.spec.dtype, 0)
            ]
            rows = sum(tensor.spec.shape[0] for tensor in held)
            shape = (rows, *held[0].spec.shape[1:])
            yield joined(template.format(layer=index), parts, shape)

    def _expert_tensor(self, expert: ExpertParts, index: int, part: str) -> PlannedTensor:
        tensor = self.views(expert.models[index])[f"model.layers.{index}.mlp.{part}"]
        if expert.entry.noise_scale and tensor.spec.dtype.mergeable:
            key = derive(self.parts.recipe.seed, *expert.path, index, part)
            noisy = Noise(tensor.expr, expert.entry.noise_scale, key)
            tensor = PlannedTensor(tensor.name, tensor.spec, noisy)
        return scaled(tensor, expert.entry.residual_scale) if part == DOWN else tensor

    def _dtype(self, index: int, part: str) -> DType:
        """Return the dtype of the tensor that experts replace in the base."""
        replaced = self.base.get(f"model.layers.{index}.mlp.{part}")
        return self.parts.dtype or (replaced.spec.dtype if replaced else self.main_dtype)

    def _pieces(self, expert: ExpertParts, index: int, part: str) -> list[Piece]:
        """Return a matrix of an expert, filled up with zeros to the width of the mixture."""
        tensor, dtype = self._expert_tensor(expert, index, part), self._dtype(index, part)
        width = self.mixture.width
        if part == DOWN and self.family.flat:
            turned = Transpose(tensor.expr)
            spec = TensorSpec(tensor.spec.dtype, tensor.spec.shape[::-1])
            return padded_rows(PlannedTensor(tensor.name, spec, turned), dtype, width)
        if part == DOWN:
            return side_by_side([tensor], dtype, width)
        return padded_rows(tensor, dtype, width if part in PARTS else 0)

    def _experts(
        self, template: str, names: tuple[str, ...], index: int
    ) -> Iterator[PlannedTensor]:
        experts = self.parts.experts
        if "{expert}" in template:
            for number, expert in enumerate(experts):
                made = [piece for name in names for piece in self._pieces(expert, index, name)]
                yield joined(template.format(layer=index, expert=number), made, _shape(made))
            return
        every = [[p for name in names for p in self._pieces(e, index, name)] for e in experts]
        rows, *rest = _shape(every[0])
        stacked = (len(experts) * rows,) if self.family.flat else (len(experts), rows)
        parts = [piece for made in every for piece in made]
        yield joined(template.format(layer=index), parts, (*stacked, *rest))

    def _shared(self, index: int) -> Iterator[PlannedTensor]:
        """Yield the shared experts side by side, as one wider MLP, and what weighs it."""
        shared = self.family.shared
        assert shared is not None
        hidden = int(self.config["hidden_size"])
        for template, names in shared.tensors.items():
            made = [piece for name in names for piece in self._shared_pieces(index, name, hidden)]
            yield joined(template.format(layer=index), made, _shape(made))
        if not shared.gate:
            return
        name = shared.gate.format(layer=index)
        if self.routed_gate:
            yield self._router(name, 1)
            return
        value = _ALWAYS if self.parts.shared else _UNUSED_GATE
        yield PlannedTensor(name, TensorSpec(self.main_dtype, (1, hidden)), FillExpr(value))

    def _shared_pieces(self, index: int, part: str, hidden: int) -> list[Piece]:
        width, dtype = self.mixture.shared, self._dtype(index, part)
        tensors = [self._expert_tensor(expert, index, part) for expert in self.parts.shared]
        if not tensors:
            shape = (hidden, width) if part == DOWN else (width, hidden)
            return [(FillExpr(0.0), TensorSpec(dtype, shape))]
        if part == DOWN:
            # A gate that is always a half halves what it weighs.
            doubled = self.gated and not self.routed_gate
            return side_by_side([scaled(t, 2.0 if doubled else 1.0) for t in tensors], dtype, width)
        made = [piece for t in tensors for piece in padded_rows(t, dtype, 0)]
        missing = width - sum(tensor.spec.shape[0] for tensor in tensors)
        if missing:
            made.append((FillExpr(0.0), TensorSpec(dtype, (missing, hidden))))
        return made


def _shape(parts: list[Piece]) -> tuple[int, ...]:
    """Return the shape of pieces that lie one after the other along the first dimension."""
    return (sum(spec.shape[0] for _, spec in parts), *parts[0][1].shape[1:])

"""Owns mixtures of experts: a base, experts and a family become a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moeforge import catalog, families
from moeforge.configs import Config, complete, portable
from moeforge.errors import Path
from moeforge.families import Family
from moeforge.planners.model import (
    EMBEDDINGS,
    HEAD,
    Findings,
    Model,
    differences,
    listing,
    natural,
)
from moeforge.plans import ROUTERS, Concat, Experts, Expr, Fill, Merge, Plan, PlannedTensor, Read
from moeforge.recipe import MoeRecipe
from moeforge.tensors import BY_NAME, DType, TensorSpec

_GLOBAL = (EMBEDDINGS, "model.norm.weight", HEAD)
_MUST_AGREE = ("hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act")
_WORTH_KNOWING = ("rope_theta", "rms_norm_eps", "vocab_size")


def choose_family(config: Config, word: str, findings: Findings, path: Path) -> Family | None:
    """Return the family for a dense config, or None after reporting why there is none.

    Args:
        config: the base's raw config.
        word: "auto", the name of a family, or the start of it.
        findings: receives the reason.
        path: where the base stands in the recipe.
    """
    kind = str(config.get("model_type"))
    accepting = families.candidates(kind)
    if word != "auto":
        accepting = [family for family in accepting if family.model_type.startswith(word.lower())]
    reasons = []
    for family in accepting:
        reason = family.refuse(complete(config))
        if not reason:
            return family
        reasons.append(f"{family.model_type}: {reason}")
    if reasons:
        what = f"no MoE family holds this {kind} model exactly: {'; '.join(reasons)}"
    else:
        what = f"{kind} models cannot become experts" + (f" of {word}" if word != "auto" else "")
    shelf = [families.load(name) for name in catalog.names("families")]
    homes = "; ".join(f"{f.model_type} from {', '.join(sorted(f.accepts))}" for f in shelf)
    findings.error(what, f"Families: {homes}.", path)
    return None


def _check_config(base: Model, findings: Findings, path: Path) -> bool:
    """Say whether the base's config has the sizes that everything else is told from."""
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    absent = [key for key in sizes if not isinstance(base.config.get(key), int)]
    if absent:
        kind = base.config.get("model_type", "without model_type")
        what = f"the config.json of {base.label} ({kind}) does not say {', '.join(absent)}"
        findings.error(what, "Give a decoder-only language model such as llama or qwen3.", path)
    return not absent


def _fits(
    base: Model, expert: Model, family: Family, findings: Findings, notes: Findings, path: Path
) -> bool:
    """Say whether an expert is of the base's kind and shape; report why not."""
    kind = str(expert.config.get("model_type"))
    if kind not in family.accepts:
        takes = ", ".join(sorted(family.accepts))
        what = f"{expert.label} is a {kind} model; {family.model_type} takes {takes}"
        findings.error(what, "Use fine-tunes of the base.", path)
        return False
    facts = differences(base, expert)
    for key in _MUST_AGREE:
        if key in facts:
            fix = "Every expert of one MoE needs the shape of the base: use fine-tunes of it."
            findings.error(facts[key], fix, path)
    for key in _WORTH_KNOWING:
        if key in facts:
            more = (
                "the base's embeddings are used, tokens it lacks are lost"
                if key == "vocab_size"
                else "attention comes from the base, the expert's MLPs were trained with another"
            )
            notes.error(f"{facts[key]}: {more}", path=path)
    return not set(facts).intersection(_MUST_AGREE)


def _mlp_tensors(model: Model, family: Family, depth: int, findings: Findings, path: Path) -> None:
    """Report MLP tensors that the family has no place for, or needs and does not find."""
    places = {f"model.layers.{i}.mlp.{rest}" for i in range(depth) for rest in family.mlp}
    own = {name for name in model.tensors if ".mlp." in name}
    if extra := sorted(own - places, key=natural):
        what = f"{family.model_type} has no place for {len(extra)} tensors of {model.label}"
        findings.error(f"{what}: {listing(extra)}", path=path)
    if absent := sorted(places - own, key=natural):
        what = f"{model.label} lacks {len(absent)} tensors: {listing(absent)}"
        findings.error(what, "Download or export it again.", path)


def _check_base(base: Model, family: Family, depth: int, findings: Findings, path: Path) -> None:
    layers = [f"model.layers.{i}." for i in range(depth)]
    needed = {layer + rest for layer in layers for rest in family.layer} | set(_GLOBAL[:2])
    allowed = needed | {layer + rest for layer in layers for rest in family.optional} | {HEAD}
    own = {name for name in base.tensors if ".mlp." not in name}
    if extra := sorted(own - allowed, key=natural):
        what = f"{family.model_type} has no place for {len(extra)} tensors of {base.label}"
        findings.error(f"{what}: {listing(extra)}", path=path)
    if absent := sorted(needed - own, key=natural):
        what = f"{base.label} lacks {len(absent)} tensors: {listing(absent)}"
        findings.error(what, "Download or export it again.", path)


def plan_moe(
    recipe: MoeRecipe,
    resolve: Callable[[object, Path], Model | None],
    path: Path,
    findings: Findings,
    notes: Findings,
) -> Plan | None:
    """Plan a mixture of experts; None where something was found wrong."""
    base = resolve(recipe.base_model, (*path, "base_model"))
    found = [
        resolve(expert.source_model, (*path, "experts", i, "source_model"))
        for i, expert in enumerate(recipe.experts)
    ]
    experts = [expert for expert in found if expert is not None]
    if base is None or not _check_config(base, findings, (*path, "base_model")):
        return None
    family = choose_family(base.config, recipe.architecture, findings, (*path, "base_model"))
    if family is None:
        return None
    before = len(findings)
    depth = int(base.config["num_hidden_layers"])
    _check_base(base, family, depth, findings, (*path, "base_model"))
    for i, expert in enumerate(found):
        here = (*path, "experts", i, "source_model")
        if expert is not None and _fits(base, expert, family, findings, notes, here):
            _mlp_tensors(expert, family, depth, findings, here)
    if len(findings) > before or len(experts) < len(found):
        return None
    return _Assembly(recipe, base, experts, family, depth).plan(notes)


class _Assembly:
    """A mixture whose parts are known to fit together."""

    def __init__(
        self, recipe: MoeRecipe, base: Model, experts: Sequence[Model], family: Family, depth: int
    ) -> None:
        self.recipe = recipe
        self.base = base
        self.experts = experts
        self.family = family
        self.depth = depth
        self.dense = complete(base.config)
        self.dtype = BY_NAME[recipe.dtype] if recipe.dtype else None
        embeddings = base.tensors[EMBEDDINGS].spec.dtype
        self.main_dtype: DType = self.dtype or embeddings

    def _layer(self, index: int) -> list[PlannedTensor]:
        family, prefix = self.family, f"model.layers.{index}."
        tensors = [
            self._cast(self.base.tensors[prefix + rest])
            for rest in (*family.layer, *family.optional)
            if prefix + rest in self.base.tensors
        ]
        taken = {tensor.name for tensor in tensors}
        for template, fill in family.fills.items():
            name, shape = template.format(layer=index), fill.shape(self.dense)
            if shape and name not in taken:
                tensors.append(
                    PlannedTensor(name, TensorSpec(self.main_dtype, shape), Fill(fill.value))
                )
        router = family.router.format(layer=index)
        shape = (len(self.experts), self.dense["hidden_size"])
        tensors.append(
            PlannedTensor(router, TensorSpec(self.main_dtype, shape), Read(ROUTERS, router))
        )
        for template, parts in family.experts.items():
            tensors.extend(self._experts(template, parts, index))
        return tensors

    def _experts(self, template: str, parts: tuple[str, ...], index: int) -> list[PlannedTensor]:
        if "{expert}" in template:
            return [
                self._concat(
                    template.format(layer=index, expert=e), [self._piece(e, index, parts[0])]
                )
                for e in range(len(self.experts))
            ]
        pieces = [self._piece(e, index, part) for e in range(len(self.experts)) for part in parts]
        return [self._concat(template.format(layer=index), pieces, stacked=True)]

    def _piece(self, expert: int, index: int, part: str) -> tuple[Expr, TensorSpec]:
        tensor = self.experts[expert].tensors[f"model.layers.{index}.mlp.{part}"]
        expr = tensor.expr
        scale = self.recipe.experts[expert].residual_scale
        if part == "down_proj.weight" and scale != 1.0:
            expr = Merge("passthrough", (expr,), (("scale", (scale,)),))
        dtype = self.dtype or self.base_dtype(tensor.name)
        return expr, TensorSpec(dtype, tensor.spec.shape)

    def base_dtype(self, name: str) -> DType:
        """Experts take the dtype of the tensor that they replace in the base."""
        return self.base.tensors[name].spec.dtype if name in self.base.tensors else self.main_dtype

    def _concat(
        self, name: str, pieces: list[tuple[Expr, TensorSpec]], *, stacked: bool = False
    ) -> PlannedTensor:
        expr, spec = pieces[0]
        if not stacked:
            return PlannedTensor(name, spec, expr)
        per_expert = len(pieces) // len(self.experts)
        rows = sum(spec.shape[0] for _, spec in pieces[:per_expert])
        shape = (len(self.experts), rows, *spec.shape[1:])
        return PlannedTensor(name, TensorSpec(spec.dtype, shape), Concat(tuple(pieces)))

    def _cast(self, tensor: PlannedTensor) -> PlannedTensor:
        return PlannedTensor(
            tensor.name, TensorSpec(self.dtype or tensor.spec.dtype, tensor.spec.shape), tensor.expr
        )

    def plan(self, notes: Findings) -> Plan:
        family, recipe = self.family, self.recipe
        head = [self.base.tensors[name] for name in _GLOBAL if name in self.base.tensors]
        layers = [tensor for index in range(self.depth) for tensor in self._layer(index)]
        tensors = (self._cast(head[0]), *layers, *map(self._cast, head[1:]))
        per_token = recipe.experts_per_token
        written = family.config(self.dense, len(self.experts), per_token)
        config = portable(self.dense, self.main_dtype.name)
        config.update({"model_type": family.model_type, "architectures": [family.architecture]})
        for key, value in written.items():
            if value is None and key != "sliding_window":
                config.pop(key, None)
            else:
                config[key] = value
        config["rms_norm_eps"] = float(config["rms_norm_eps"])
        config["tie_word_embeddings"] = self.base.tied
        routers = tuple(family.router.format(layer=i) for i in range(self.depth))
        expert_parameters = sum(
            self.experts[e].tensors[f"model.layers.{i}.mlp.{part}"].spec.numel
            for e in range(len(self.experts))
            for i in range(self.depth)
            for part in family.mlp
        )
        labels = tuple(expert.label for expert in self.experts)
        experts = Experts(
            family.model_type,
            self.base.label,
            labels,
            per_token,
            recipe.gate_mode,
            routers,
            expert_parameters,
        )
        sources = dict(self.base.sources)
        for expert in self.experts:
            sources.update(expert.sources)
        return Plan(
            "moe",
            tensors,
            config,
            sources,
            self.base.donor,
            experts,
            self.base.tokenizer,
            self._left_out(),
            tuple(notes),
        )

    def _left_out(self) -> dict[str, str]:
        """List what the experts and the base have and the mixture knowingly does not use."""
        left = {f"{self.base.label}: {name}": why for name, why in self.base.left_out.items()}
        labels = {expert.label for expert in self.experts}
        if self.base.label not in labels:
            for name in self.base.tensors:
                if ".mlp." in name:
                    left[f"{self.base.label}: {name}"] = "the experts' MLPs take its place"
        for expert in self.experts:
            if expert.label == self.base.label:
                continue
            for name in (*expert.tensors, *expert.left_out):
                if ".mlp." not in name:
                    left[f"{expert.label}: {name}"] = "comes from the base"
        return left

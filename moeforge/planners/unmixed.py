"""Owns reading a mixture as it lies on disk: its family, which layers have experts, every MLP.

The templates of `families` read backwards. Knows tensors as expressions, no recipe, no output.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from moeforge import catalog, families
from moeforge.configs import Config, n_layers, plain_floats
from moeforge.errors import Path
from moeforge.families import Family
from moeforge.families._transforms import rows, transposed
from moeforge.planners.model import Findings, Model
from moeforge.planners.prediction import without_prediction
from moeforge.plans import PlannedTensor, Shaped
from moeforge.tensors import TensorSpec

DOWN = "down_proj.weight"
PER_TOKEN = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "moe_top_k")
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Keys of configs for the experts of a token, and of a layer."""
INNER = "ffn_config"
"""Where DBRX says both."""
_FUSED = re.compile(r"^(model\.layers\.\d+\.)(?:mlp|block_sparse_moe)\.experts\.(\w+)$")


@dataclass(frozen=True)
class Unmixed:
    """A mixture whose parts can be named.

    Attributes:
        model: the mixture, its tensors under the names of the family's templates.
        family: how it lies on disk.
        config: its config with what transformers takes for keys that are left out.
    """

    model: Model
    family: Family
    config: Config

    @cached_property
    def depth(self) -> int:
        """Number of layers."""
        return n_layers(self.config) or 0

    @cached_property
    def sparse(self) -> tuple[bool, ...]:
        """For each layer, whether it has experts."""
        routers = (self.family.router.format(layer=layer) for layer in range(self.depth))
        return tuple(name in self.model.tensors for name in routers)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Layers with experts."""
        return tuple(layer for layer, sparse in enumerate(self.sparse) if sparse)

    @cached_property
    def experts(self) -> int:
        """Number of experts."""
        return self.router(self.layers[0]).spec.shape[0]

    @property
    def per_token(self) -> int:
        """How many of them each token passes through."""
        place = self.config.get(INNER) or self.config
        return int(next(place[key] for key in PER_TOKEN if isinstance(place.get(key), int)))

    @cached_property
    def width(self) -> int:
        """Intermediate size of an expert."""
        return self.expert(self.layers[0], 0, DOWN).spec.shape[1]

    def router(self, layer: int) -> PlannedTensor:
        """Return the router weight [experts, hidden] of a layer."""
        return self.model.tensors[self.family.router.format(layer=layer)]

    def expert(self, layer: int, number: int, part: str) -> PlannedTensor:
        """Return a matrix of an expert, as a dense model has it: [out, in].

        Args:
            layer: number of the layer.
            number: of the expert.
            part: one of `family.mlp`.
        """
        found = (item for item in self.family.experts.items() if part in item[1])
        template, names = next(found)
        whole = self.model.tensors[template.format(layer=layer, expert=number)]
        if "{expert}" not in template:
            whole = flat(whole)
            each = whole.spec.shape[0] // self.experts
            whole = rows(whole, whole.name, number * each, each)
        made = _part(whole, names, part)
        return transposed(made) if self.family.flat and part == DOWN else made

    def mlp(self, templates: Mapping[str, tuple[str, ...]], layer: int, part: str) -> PlannedTensor:
        """Return a matrix of an MLP beside the experts, which `templates` name."""
        template, names = next(item for item in templates.items() if part in item[1])
        return _part(self.model.tensors[template.format(layer=layer)], names, part)

    def names(self, layer: int) -> Iterator[str]:
        """Yield the names of everything that a layer's mixture block consists of."""
        family = self.family
        shared = (*family.shared.tensors, family.shared.gate) if family.shared else ()
        made = (*family.sparse_fills, *(shared if self.sparse[layer] else ()))
        for template in (family.router, *made, *family.dense_mlp):
            yield template.format(layer=layer)
        for template in family.experts:
            count = self.experts if "{expert}" in template else 1
            yield from (template.format(layer=layer, expert=number) for number in range(count))


def flat(tensor: PlannedTensor) -> PlannedTensor:
    """Return a stack of matrices as one, the rows of each after those of the one before."""
    shape = tensor.spec.shape
    if len(shape) != 3:
        return tensor
    shape = (shape[0] * shape[1], shape[2])
    spec = TensorSpec(tensor.spec.dtype, shape)
    return PlannedTensor(tensor.name, spec, Shaped(tensor.expr, shape))


def _part(whole: PlannedTensor, names: tuple[str, ...], part: str) -> PlannedTensor:
    """Return one of the matrices that lie one after the other in `whole`."""
    if len(names) == 1:
        return whole
    each = whole.spec.shape[0] // len(names)
    return rows(whole, whole.name, names.index(part) * each, each)


def unmixed(model: Model, findings: Findings, path: Path) -> Unmixed | None:
    """Return the parts of a mixture; None after reporting why they cannot be told."""
    kind = str(model.config.get("model_type", "without model_type"))
    if kind not in catalog.names("families"):
        fix = f"Give one of these: {', '.join(catalog.names('families'))}."
        if families.candidates(kind):
            fix = "Give a mixture of experts; `moeforge upcycle` makes one of a dense model."
        what = f"{model.label} is a {kind} model, which is no mixture that can be taken apart"
        findings.error(what, fix, path)
        return None
    family = families.load(kind)
    model = without_prediction(model)
    model = replace(model, tensors=_by_templates(model.tensors, family))
    try:
        config = filled_in(model.config)
    except Exception as error:  # transformers has many ways to refuse a config
        what = f"{model.label}: transformers does not read its config.json: {error}"
        findings.error(what, "Download or export it again.", path)
        return None
    made = Unmixed(model, family, config)
    if reason := _incomplete(made):
        findings.error(f"{model.label}: {reason}", "Download or export it again.", path)
        return None
    return made


def _incomplete(made: Unmixed) -> str:
    """Return what is missing of a mixture, or ""."""
    if not made.layers:
        router = made.family.router.format(layer=0)
        return f"no layer has a router, such as {router}"
    try:
        for layer in made.layers:
            if made.router(layer).spec.shape[0] != made.experts:
                return f"layer {layer} has another number of experts than layer {made.layers[0]}"
            for part in made.family.mlp:
                for number in range(made.experts):
                    made.expert(layer, number, part)
        _ = made.per_token
    except KeyError as error:
        return f"it lacks {error.args[0]}"
    except StopIteration:
        return "config.json does not say how many experts a token passes through"
    return ""


def filled_in(config: Config) -> Config:
    """Return the config of a mixture with what transformers takes for keys that it leaves out."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    given: dict[str, Any] = {key: value for key, value in config.items() if key != "auto_map"}
    given = plain_floats(given)
    full = CONFIG_MAPPING[str(config["model_type"])].from_dict(given).to_dict()
    of_all = PretrainedConfig().to_dict()
    known = {*of_all, *config}
    # Infinite numbers come in words here.
    left_out = plain_floats({key: full[key] for key in full if key not in known})
    return {**left_out, **config}


def _by_templates(
    tensors: Mapping[str, PlannedTensor], family: Family
) -> Mapping[str, PlannedTensor]:
    """Return tensors under the names of the family's templates.

    mergekit and exports of transformers 5's modules stack what the Hub has one by one:
    gate_up_proj [experts, 2 · width, hidden] and down_proj [experts, hidden, width].
    """
    if not any("{expert}" in template for template in family.experts):
        return tensors
    templates = {part: template for template, (part, *_) in family.experts.items()}
    result: dict[str, PlannedTensor] = {}
    for name, tensor in tensors.items():
        match = _FUSED.match(name)
        if not match or len(tensor.spec.shape) != 3:
            name = _router(name, family)
            result[name] = replace(tensor, name=name)
            continue
        layer = int(match[1].split(".")[2])
        parts = (DOWN,) if match[2] == "down_proj" else ("gate_proj.weight", "up_proj.weight")
        count, each = tensor.spec.shape[0], tensor.spec.shape[1] // len(parts)
        for number in range(count * len(parts)):
            expert, part = divmod(number, len(parts))
            made = templates[parts[part]].format(layer=layer, expert=expert)
            result[made] = rows(flat(tensor), made, number * each, each)
    return result


def _router(name: str, family: Family) -> str:
    """Return the name of a router in the family's template, or `name` if it is none."""
    match = re.match(r"^model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.gate\.weight$", name)
    return family.router.format(layer=match[1]) if match else name

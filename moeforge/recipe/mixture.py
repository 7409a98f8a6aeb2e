"""Owns the recipe language of mixtures of experts."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from moeforge import catalog
from moeforge.recipe.document import unknown
from moeforge.recipe.gating import GateParameters
from moeforge.recipe.schema import (
    Finite,
    LayerRange,
    Model,
    Recipe,
    Seed,
    Text,
    or_no_entries,
    parse_model,
)
from moeforge.recipe.selecting import EmbeddingKeys, PromptFileKeys
from moeforge.recipe.strict import Strict, Written, or_empty, show, wrong
from moeforge.recipe.tuning import Tuning

REMOTE = "remote"
"""The word for a mixture with modeling code of its own."""

NO_HOMES = {
    "olmoe": "it normalises queries and keys over their full width in pre-norm blocks",
    "minimax": "its attention is linear, or normalised as no dense family's is",
    "minimax_m2": "it normalises queries and keys over their full width in pre-norm blocks",
    "jetmoe": "its attention is a mixture of experts itself",
    "llama4_text": "it scales the input of each expert by the router's score, which is not linear",
    "qwen3_next": "its attention layers are gated, its others linear: only its own kind fits",
    "jamba": "its layers are Mamba's and attention without positions",
    "nemotron_h": "its attention has no positions, and its layers hold one mixer each",
    "deepseek_v2": "deepseek_v3 holds the same dense models, and its router has a selection bias",
    "gpt_oss": "its experts have biases and its attention has sinks; see architecture: remote",
    "phimoe": "it weighs two experts by one each, not by shares that add up to one",
    "switch_transformers": "it is an encoder and a decoder",
    "nllb_moe": "it is an encoder and a decoder",
    "doge": "its experts are rows of an embedding",
}
"""MoE architectures of transformers that hold no dense family exactly, and why."""


def _gate_mode(word: str) -> str:
    if word not in catalog.names("gates"):
        raise wrong(unknown("gate mode", word, catalog.names("gates")))
    return word


def _architecture(word: str) -> str:
    words = ("auto", REMOTE, *catalog.names("families"), *NO_HOMES)
    if not word or not any(name.startswith(word.lower()) for name in words):
        raise wrong(unknown("architecture", word, words))
    return word


class LayerSource(Strict):
    """What an expert is in some layers.

    Attributes:
        model: a path, a Hub id, or a recipe.
        layer_range: [start, end): the layers that it gives, from 0, the end exclusive.
    """

    model: Model
    layer_range: LayerRange


def _source(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        return parse_model(value)
    if not value:
        raise wrong("expected a model, or a list of {model, layer_range}, got an empty list")
    return tuple(LayerSource.model_validate(entry) for entry in value)


_PARTS = {
    "anyOf": [
        {"$ref": "#/definitions/model"},
        {"type": "array", "items": {"$ref": "#/definitions/LayerSource"}, "minItems": 1},
    ]
}


class Expert(PromptFileKeys):
    """A model whose MLPs become one expert in every layer, or several for ranges of layers.

    Attributes:
        source_model: the model, or a list of {model, layer_range}: layer i of the mixture has the
            MLP of layer i of the model whose range holds i.
        positive_prompts: texts that should reach this expert.
        negative_prompts: texts that should not.
        residual_scale: factor on the expert's down projection.
        noise_scale: standard deviation of normal noise on all weights of the expert, drawn from
            `seed`; a router that is fitted on what the mixture computes does not meet it.
    """

    source_model: Annotated[Any, BeforeValidator(_source), Written(_PARTS)]
    positive_prompts: tuple[Text, ...] = ()
    negative_prompts: tuple[Text, ...] = ()
    residual_scale: Finite = 1.0
    noise_scale: Annotated[Finite, Field(ge=0)] = 0.0

    @property
    def has_prompts(self) -> bool:
        """Whether there are texts that should reach it."""
        return bool(self.positive_prompts or self.prompts_file)

    @property
    def models(self) -> tuple[Any, ...]:
        """The models that it is made of."""
        if isinstance(self.source_model, tuple):
            return tuple(part.model for part in self.source_model)
        return (self.source_model,)


class Every(Strict):
    """Layers at regular distances: skip_first, skip_first + every, …, below depth - skip_last.

    Attributes:
        every: the distance.
        skip_first: layers at the bottom that are left out.
        skip_last: layers at the top that are left out.
    """

    every: int = Field(default=1, ge=1)
    skip_first: int = Field(default=0, ge=0)
    skip_last: int = Field(default=0, ge=0)


def _layers(value: Any) -> Any:
    if value == "all" or isinstance(value, Every):
        return value
    if isinstance(value, dict):
        return Every.model_validate(value)
    if not isinstance(value, (list, tuple)) or not value:
        raise wrong(
            'expected "all", a list of layers and [start, end] ranges, or '
            f"{{every, skip_first, skip_last}}, got {show(value)}"
        )
    for entry in value:
        pair = isinstance(entry, (list, tuple)) and len(entry) == 2
        numbers = entry if pair else (entry,)
        if not all(type(n) is int and n >= 0 for n in numbers) or (pair and entry[0] >= entry[1]):
            raise wrong(f"expected a layer or [start, end], the end exclusive, got {show(entry)}")
    return tuple(tuple(entry) if isinstance(entry, (list, tuple)) else entry for entry in value)


_LAYER = {"type": "integer", "minimum": 0}
_LAYERS = {
    "anyOf": [
        {"const": "all"},
        {
            "type": "array",
            "items": {
                "anyOf": [_LAYER, {"type": "array", "items": _LAYER, "minItems": 2, "maxItems": 2}]
            },
            "minItems": 1,
        },
        {"$ref": "#/definitions/Every"},
    ]
}


class MoeRecipe(Recipe, EmbeddingKeys):
    """A mixture of experts: everything but the MLPs from `base_model`, one MLP per expert.

    Attributes:
        base_model: gives attention, norms, embeddings, config and tokenizer.
        experts: whose MLPs; each is an expert in every layer that has experts.
        experts_per_token: experts that each token passes through.
        architecture: the MoE family of the result; "auto" takes the most portable one that is
            exact, "remote" brings code of its own. The start of a name will do.
        gate_mode: how router weights are made.
        seed: what everything random follows from.
        shared_experts: models whose MLPs every token passes through, beside the chosen experts.
        layers: which layers have experts; the others keep the base's MLP. "all", a list of layer
            numbers and [start, end) ranges, or regular distances.
        gate_parameters: how the gate mode makes router weights; only `fitted` has any.
        tune: train the routers, and nothing else, once the mixture is there.
        pad_experts: fill MLPs of unequal width up with zeros, which changes nothing but the size.
    """

    base_model: Model
    experts: tuple[Expert, ...] = Field(min_length=1)
    shared_experts: Annotated[tuple[Expert, ...], BeforeValidator(or_no_entries)] = ()
    experts_per_token: int = Field(default=2, ge=1)
    architecture: Annotated[
        str, AfterValidator(_architecture), Written({"$ref": "#/definitions/architecture"})
    ] = "auto"
    gate_mode: Annotated[
        str, AfterValidator(_gate_mode), Written({"$ref": "#/definitions/gate_mode"})
    ] = "fitted"
    gate_parameters: Annotated[GateParameters, BeforeValidator(or_empty)] = GateParameters()
    layers: Annotated[Any, BeforeValidator(_layers), Written(_LAYERS)] = "all"
    pad_experts: bool = False
    tune: Tuning | None = None
    seed: Seed = 0

    @property
    def numbered(self) -> list[tuple[tuple[str | int, ...], Expert]]:
        """Experts with their places, as prompts are numbered: shared ones follow if they have any.

        A shared expert may have prompts where its family weighs it, but needs none.
        """
        routed = [(("experts", i), expert) for i, expert in enumerate(self.experts)]
        shared = [(("shared_experts", i), expert) for i, expert in enumerate(self.shared_experts)]
        return [*routed, *(entry for entry in shared if entry[1].has_prompts)]

    def sparse(self, depth: int) -> tuple[bool, ...]:
        """Return for each of `depth` layers whether it has experts.

        Raises:
            ValueError: `layers` names a layer that there is not, or leaves none.
        """
        if self.layers == "all":
            return (True,) * depth
        if isinstance(self.layers, Every):
            rule = self.layers
            chosen = set(range(rule.skip_first, depth - rule.skip_last, rule.every))
        else:
            spans = [(e, e + 1) if isinstance(e, int) else e for e in self.layers]
            if beyond := [span for span in spans if span[1] > depth]:
                raise ValueError(f"layer {beyond[0][1] - 1} is asked for, the base has {depth}")
            chosen = {layer for start, end in spans for layer in range(start, end)}
        if not chosen:
            raise ValueError(f"no layer is left: the base has {depth}")
        return tuple(layer in chosen for layer in range(depth))

    @field_validator("gate_parameters", mode="before")
    @classmethod
    def _of_this_mode(cls, value: Any, info: ValidationInfo) -> Any:
        mode = info.data.get("gate_mode", "fitted")
        if value and mode != "fitted":
            given = ", ".join(map(str, value)) if isinstance(value, dict) else show(value)
            raise wrong(f"gate mode {mode} has no parameters, got {given}; only fitted has any")
        return value

    @field_validator("gate_parameters")
    @classmethod
    def _load_is_possible(cls, parameters: GateParameters, info: ValidationInfo) -> GateParameters:
        experts, per_token = info.data.get("experts"), info.data.get("experts_per_token")
        if experts and per_token and (reason := parameters.misfit(len(experts), per_token)):
            raise wrong(reason)
        return parameters

    @field_validator("experts_per_token")
    @classmethod
    def _enough_experts(cls, per_token: int, info: ValidationInfo) -> int:
        if "experts" not in info.data:
            return per_token  # they are wrong, and reported themselves
        count = len(info.data["experts"])
        if per_token > count:
            raise wrong(
                f"experts_per_token is {per_token}, but there "
                f"{'is 1 expert' if count == 1 else f'are {count} experts'}"
                f"; list more experts or lower experts_per_token to {count}"
            )
        return per_token

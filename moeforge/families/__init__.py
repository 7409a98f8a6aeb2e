"""The shelf of MoE families: one file per target architecture, named by its `model_type`.

A family is data: which dense types it can hold, how their tensors become what it speaks of, where
router and experts lie on disk, and what config.json says. Moving bytes is for planners and engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from moeforge import catalog
from moeforge.configs import Config
from moeforge.dense import EMBEDDINGS, HEAD, NORM
from moeforge.plans import PlannedTensor

Tensors = Mapping[str, PlannedTensor]
"""Tensors of a dense model by name."""

_ATTENTION = tuple(f"self_attn.{part}_proj.weight" for part in "qkvo")
LLAMA_LAYER = ("input_layernorm.weight", "post_attention_layernorm.weight", *_ATTENTION)
"""What every layer of a llama-like model has besides its MLP, below `model.layers.{layer}.`."""
QKV_BIASES = tuple(f"self_attn.{part}_proj.bias" for part in "qkv")
QKVO_BIASES = (*QKV_BIASES, "self_attn.o_proj.bias")
QK_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")


@dataclass(frozen=True)
class Mixture:
    """What is wanted of a mixture, beside its dense parts.

    Attributes:
        experts: number of routed experts.
        per_token: how many of them each token passes through.
        width: intermediate size of each of them.
        sparse: for each layer, whether it has experts; the others keep the base's MLP.
        shared: intermediate size of all shared experts together; 0 if there are none.
    """

    experts: int
    per_token: int
    width: int
    sparse: tuple[bool, ...]
    shared: int = 0


Shape = Callable[[Config, Mixture], tuple[int, ...]]


@dataclass(frozen=True)
class Fill:
    """A tensor that the family needs and the dense model lacks, of one value everywhere.

    Attributes:
        shape: from the dense config in the family's words; () where no such tensor is written.
        value: its elements.
        dtype: dtype on disk; None for that of the model.
    """

    shape: Shape
    value: float = 0.0
    dtype: str | None = None


def _as_it_is(config: Config) -> Config:
    return config


def _tensors_as_they_are(config: Config, tensors: Tensors) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Accept:
    """A dense type that a family can hold, and how it is put into the family's words.

    Attributes:
        rank: order among the homes of this type; the lowest is the most portable.
        refuse: (completed dense config) -> why this one has no exact home here, or "".
        config: (completed dense config) -> config in the words that the family's functions read:
            llama's, and what the family adds to them.
        tensors: (completed dense config, tensors) -> tensors in the layout that the family's
            templates speak of: llama's names, experts below `model.layers.{layer}.mlp.`. Used for
            the base and for every expert.
        exotic: (completed dense config) -> what another engine would silently get wrong about the
            result, or ""; such a home is only taken when the recipe names it.
        note: what should be known of the result, always; or (completed dense config) -> it, or "".
    """

    rank: int = 0
    refuse: Callable[[Config], str] = lambda config: ""
    config: Callable[[Config], Config] = _as_it_is
    tensors: Callable[[Config, Tensors], Tensors] = _tensors_as_they_are
    exotic: Callable[[Config], str] = lambda config: ""
    note: str | Callable[[Config], str] = ""


@dataclass(frozen=True)
class Shared:
    """How a family holds shared experts: MLPs that every token passes through.

    Attributes:
        tensors: for each output template, the dense MLP tensors that it holds; several shared
            experts lie side by side in it, as one wider MLP.
        needed: the family must have one; where the recipe gives none, it is of zeros.
        zero_width: (config, mixture) -> width of the one of zeros.
        step: (config, mixture) -> what the width must be a multiple of; zeros fill it up.
        most: largest width, in steps; None for any.
        gate: template of the weight [1, hidden] of a sigmoid gate on the shared expert, if any.
    """

    tensors: Mapping[str, tuple[str, ...]]
    needed: bool = False
    zero_width: Callable[[Config, Mixture], int] = lambda config, mixture: mixture.width
    step: Callable[[Config, Mixture], int] = lambda config, mixture: 1
    most: int | None = None
    gate: str = ""


def llama_layer(config: Config, layer: int) -> tuple[str, ...]:
    """Return the tensors of a llama-like layer beside its MLP."""
    return LLAMA_LAYER


def no_refusal(config: Config, mixture: Mixture) -> str:
    """Refuse nothing."""
    return ""


def _same_name(name: str) -> str:
    return name


@dataclass(frozen=True)
class Family:
    """A MoE architecture as it lies on disk. Templates know {layer} and {expert}.

    `config` here is the dense config in the family's words, as `Accept.config` returns it.

    Attributes:
        model_type: its name in config.json.
        architecture: class in transformers.
        accepts: dense model types it can hold exactly.
        router: template of the router weight [experts, hidden].
        experts: for each output template, the dense MLP tensors that it holds, in this order.
            Without {expert} in it, it is stacked over all experts along a new first dimension.
        config: (config, mixture) -> what to write over it; None removes a key.
        refuse: (config, mixture) -> why this mixture has no exact home here, or "".
        exotic: (config, mixture) -> as in `Accept`.
        layer: (config, layer) -> tensors of this layer that must be there, beside the MLP, below
            `model.layers.{layer}.`.
        optional: those that may be there.
        outside: tensors outside the layers that must be there.
        outside_optional: those that may be there.
        fills: per-layer tensors made up where the dense model has none.
        sparse_fills: the same, in layers with experts only.
        rename: name of a tensor that is neither MLP nor router -> its name on disk.
        dense_mlp: for each output template, the dense MLP tensors of a layer without experts;
            empty where the family has experts in every layer.
        sparse: (config, mixture) -> keys that say which layers have experts, or why it cannot say
            so.
        shared: how it holds shared experts; None if it has none.
        flat: tensors stacked over experts keep two dimensions, the experts' rows one after the
            other, and down projections are stored the other way round (dbrx).
        score: what turns router logits into scores, "softmax" or "sigmoid".
        selection_bias: template of what is added to the scores of experts for choosing among them,
            and not for weighing them; one of `sparse_fills`, "" if there is none.
    """

    model_type: str
    architecture: str
    accepts: Mapping[str, Accept]
    router: str
    experts: Mapping[str, tuple[str, ...]]
    config: Callable[[Config, Mixture], Config]
    refuse: Callable[[Config, Mixture], str] = no_refusal
    exotic: Callable[[Config, Mixture], str] = no_refusal
    layer: Callable[[Config, int], tuple[str, ...]] = llama_layer
    optional: tuple[str, ...] = ()
    outside: tuple[str, ...] = (EMBEDDINGS, NORM)
    outside_optional: tuple[str, ...] = (HEAD,)
    fills: Mapping[str, Fill] = field(default_factory=dict)
    sparse_fills: Mapping[str, Fill] = field(default_factory=dict)
    rename: Callable[[str], str] = _same_name
    dense_mlp: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sparse: Callable[[Config, Mixture], Config | str] | None = None
    shared: Shared | None = None
    flat: bool = False
    score: str = "softmax"
    selection_bias: str = ""

    @property
    def mlp(self) -> tuple[str, ...]:
        """Dense MLP tensors of a layer, below `mlp.`; all of them must be there."""
        return tuple(dict.fromkeys(name for names in self.experts.values() for name in names))


def silu_only(name: str) -> Callable[[Config, Mixture], str]:
    """Return the `exotic` of a family that other engines compute with SiLU, whatever is asked.

    Args:
        name: how people call the family.
    """

    def exotic(config: Config, mixture: Mixture) -> str:
        if config["hidden_act"] == "silu":
            return ""
        return f"other engines compute {name} with SiLU, this model has {config['hidden_act']}"

    return exotic


PARTS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
"""The tensors of a gated MLP."""


def each(stem: str, names: tuple[str, ...] = PARTS) -> dict[str, tuple[str, ...]]:
    """Return templates `{stem}.{name}` that hold the dense tensor of the same name each."""
    return {f"{stem}.{name}": (name,) for name in names}


def load(name: str) -> Family:
    """Return the family in file `name`."""
    family: Family = catalog.load("families", name, "FAMILY")
    return family


def shelf() -> list[Family]:
    """Return all families by name."""
    return [load(name) for name in catalog.names("families")]


def candidates(model_type: str) -> list[Family]:
    """Return the families that hold dense `model_type`, the most portable first."""
    return sorted(
        (family for family in shelf() if model_type in family.accepts),
        key=lambda family: (family.accepts[model_type].rank, family.model_type),
    )

"""The shelf of MoE families: one file per target architecture, named by its `model_type`.

A family is data: where the router and the experts lie on disk, which tensors of a dense model have
a place, and what config.json says. Moving bytes is for the planners and the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from moeforge import catalog
from moeforge.configs import Config

LLAMA_LAYER = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
)
"""What every layer of a llama-like model has besides its MLP, below `model.layers.{layer}.`."""


@dataclass(frozen=True)
class Fill:
    """A tensor that the family needs and dense models lack, of one value everywhere.

    Attributes:
        shape: from the completed dense config.
        value: its elements.
    """

    shape: Callable[[Config], tuple[int, ...]]
    value: float = 0.0


@dataclass(frozen=True)
class Family:
    """A MoE architecture as it lies on disk. Templates know {layer} and {expert}.

    Attributes:
        model_type: its name in config.json.
        architecture: class in transformers.
        accepts: dense model types it can hold exactly, with a rank; the lowest rank is the most
            portable home of that type.
        router: template of the router weight [experts, hidden].
        experts: for each output template, the dense MLP tensors that it holds, in this order.
            Without {expert} in it, it is stacked over all experts along a new first dimension.
        config: (completed dense config, experts, experts per token) -> what to write over it;
            None removes a key.
        refuse: (completed dense config) -> why this one has no exact home here, or "".
        layer: dense per-layer tensors that must be there, beside the MLP.
        optional: dense per-layer tensors that may be there.
        fills: per-layer tensors made up where the dense model has none.
    """

    model_type: str
    architecture: str
    accepts: Mapping[str, int]
    router: str
    experts: Mapping[str, tuple[str, ...]]
    config: Callable[[Config, int, int], Config]
    refuse: Callable[[Config], str] = lambda config: ""
    layer: tuple[str, ...] = LLAMA_LAYER
    optional: tuple[str, ...] = ()
    fills: Mapping[str, Fill] = field(default_factory=dict)

    @property
    def mlp(self) -> tuple[str, ...]:
        """Dense MLP tensors of a layer, below `mlp.`; all of them must be there."""
        return tuple(dict.fromkeys(name for names in self.experts.values() for name in names))


def load(name: str) -> Family:
    """Return the family in file `name`."""
    family: Family = catalog.load("families", name, "FAMILY")
    return family


def candidates(model_type: str) -> list[Family]:
    """Return the families that hold dense `model_type`, the most portable first."""
    shelf = [load(name) for name in catalog.names("families")]
    return sorted(
        (family for family in shelf if model_type in family.accepts),
        key=lambda family: family.accepts[model_type],
    )

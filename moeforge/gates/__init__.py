"""The shelf of gate modes: one file per way to make router weights, named as recipes name it.

A gate mode is arithmetic on what the base computes on prompts; running the base, tokenizing and
writing are done elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moeforge import catalog
from moeforge.recipe import GateParameters
from moeforge.workers import Share, alone

if TYPE_CHECKING:
    from torch import Tensor

    from moeforge.forward import LayerInputs


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt of one expert, or of none.

    Attributes:
        expert: index of the expert it belongs to; -1 where it belongs to none.
        negative: it should *not* reach that expert.
        ids: token ids.
        first: index of the first token that counts: 1 where the prompt begins with BOS.
        losses: for a prompt of no expert, the mean loss of each expert's dense model on it.
    """

    expert: int
    negative: bool
    ids: tuple[int, ...]
    first: int
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class LayerGate:
    """The router of one layer. E experts, one more where a shared expert's gate is made too.

    Attributes:
        weight: [E, H] float32.
        bias: what is added to scores for choosing only, [E] float32, or None.
    """

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class LayerFit:
    """What is worth knowing of one fitted layer.

    Attributes:
        regularization: λ.
        temperature: factor on the logits.
        loss: cross entropy on prompts that the fit did not see, in nats; NaN where there are none.
        fitted_load: share of the choices that each expert gets, as fitted.
        load: the same after balancing.
    """

    regularization: float
    temperature: float
    loss: float
    fitted_load: tuple[float, ...]
    load: tuple[float, ...]


@dataclass(frozen=True)
class Gates:
    """Router weights of all layers that have experts.

    Attributes:
        weights_LEH: router weights in float32.
        biases_LE: selection biases in float32, where the input asked for them.
        fits: for each layer what is known of it; empty for modes that fit nothing.
    """

    weights_LEH: Tensor
    biases_LE: Tensor | None = None
    fits: tuple[LayerFit, ...] = ()


@dataclass(frozen=True)
class GateInput:
    """What a gate mode works from. L layers, E experts, H hidden.

    Attributes:
        shape: (L, E, H); E counts a shared expert whose gate is made too.
        seed: everything random follows from it.
        prompts: all prompts; empty for modes that need none.
        embed: rows of the embedding matrix for token ids, [ids, H] float32.
        walk: runs the base once over `prompts`; yields for each layer what each prompt met.
        grow: runs the mixture that comes about: asks for the router of each layer, given what each
            prompt met on its way through the layers below with the routers given for them.
        gated: the last of the E experts is a shared one, and its row the weight of its sigmoid.
        sigmoid: scores are sigmoids of logits, not their softmax.
        per_token: experts that each token passes through.
        biased: the architecture has a selection bias, and it is to be made.
        on_policy: whether the recipe or its base ask for `grow`.
        parameters: what the recipe says of the fit.
        share: gives work to threads.
    """

    shape: tuple[int, int, int]
    seed: int
    prompts: Sequence[TokenizedPrompt]
    embed: Callable[[Sequence[int]], Tensor]
    walk: Callable[[], Iterator[Sequence[LayerInputs]]]
    grow: Callable[[Callable[[Sequence[LayerInputs]], LayerGate]], None] | None = None
    gated: bool = False
    sigmoid: bool = False
    per_token: int = 1
    biased: bool = False
    on_policy: bool = False
    parameters: GateParameters = field(default_factory=GateParameters)
    share: Share = alone


@dataclass(frozen=True)
class Gate:
    """A gate mode.

    Attributes:
        title: what it does, in half a sentence.
        build: GateInput -> router weights gates_LEH in float32, or `Gates` to say more.
        needs_prompts: every expert must have at least one positive prompt.
    """

    title: str
    build: Callable[[GateInput], Tensor | Gates]
    needs_prompts: bool


def load(name: str) -> Gate:
    """Return the gate mode in file `name`."""
    gate: Gate = catalog.load("gates", name, "GATE")
    return gate

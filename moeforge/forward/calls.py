"""Owns how a model calls its layers: written down once, with stand-ins for the layers.

Knows transformers' calling conventions; knows no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from moeforge.dense import Anatomy

if TYPE_CHECKING:
    from torch import Tensor, nn

Returns = Callable[["Tensor"], Any]
"""What a layer returns, given the hidden states: models unpack that before the next layer."""


class Stop(Exception):
    """Ends a forward pass that has told what was asked of it."""


@dataclass(frozen=True)
class Call:
    """How a model calls one of its layers.

    Attributes:
        hidden: the hidden states that it gives to the first layer, [1, tokens, hidden] or with
            more dimensions in front.
        args: what it gives besides them.
        kwargs: the same, by name.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def layers_of(model: nn.Module, place: Anatomy) -> nn.ModuleList:
    """Return the layers of `model`.

    Raises:
        ValueError: they are not where they should be, or have no MLP.
    """
    kind = model.config.model_type  # type: ignore[union-attr]
    try:
        layers: Any = model.get_submodule(place.layers.rstrip("."))
        for layer in layers:
            layer.get_submodule(place.mlp)
    except AttributeError as error:
        what = f"{kind} models have no layers {place.layers}N.{place.mlp} in transformers"
        raise ValueError(f"{what} ({error}): use a gate_mode that does not run the base") from None
    found: nn.ModuleList = layers
    return found


def _stand_in(layer: nn.Module, respond: Callable[[Call], Any]) -> nn.Module:
    """Return what a model takes for `layer`, and that answers by `respond`."""
    from torch import nn

    class StandIn(nn.Module):
        def __getattr__(self, name: str) -> Any:
            # Models choose masks by attributes of the layer, such as its attention_type.
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(layer, name)

        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return respond(Call(hidden_states, args, kwargs))

    return StandIn()


@contextmanager
def _replaced(layers: nn.ModuleList, respond: Callable[[int, Call], Any]) -> Iterator[None]:
    """Let `respond` answer, given its number, for every layer."""
    real = list(layers)
    for index, layer in enumerate(real):
        layers[index] = _stand_in(layer, partial(respond, index))
    try:
        yield
    finally:
        for index, layer in enumerate(real):
            layers[index] = layer


def record(
    model: nn.Module,
    layers: nn.ModuleList,
    prompt: Sequence[int],
    returns: Returns | None,
    device: str,
) -> list[Call]:
    """Return how the model would call its layers; the first only, where `returns` is None."""
    import torch

    decoder: Any = model.base_model
    calls: list[Call] = []

    def respond(index: int, call: Call) -> Any:
        calls.append(call)
        if returns is None or index == len(layers) - 1:
            raise Stop
        return returns(call.hidden)

    with _replaced(layers, respond), suppress(Stop):
        decoder(input_ids=torch.tensor([prompt]).to(device), use_cache=False)
    return calls


def finish(
    model: nn.Module,
    layers: nn.ModuleList,
    prompt: Sequence[int],
    returns: Returns,
    hidden: Tensor,
    device: str,
) -> Tensor:
    """Return the logits [1, tokens, vocabulary] that follow from what the last layer returned.

    Args:
        model: what comes before and after its layers has weights.
        layers: its layers; they are not run.
        prompt: token ids.
        returns: what layers return.
        hidden: what the last layer has made of the prompt.
        device: torch device.
    """
    import torch

    def respond(index: int, call: Call) -> Any:
        return returns(hidden if index == len(layers) - 1 else call.hidden)

    with _replaced(layers, respond):
        found: Any = model(input_ids=torch.tensor([prompt]).to(device), use_cache=False)
    logits: Tensor = found.logits
    return logits


def convention(layer: nn.Module, call: Call) -> Returns:
    """Try how `layer`, whose weights are there, returns the hidden states: alone, or with more."""
    import torch

    found = layer(call.hidden, *call.args, **call.kwargs)
    if isinstance(found, torch.Tensor):
        return lambda hidden: hidden
    return lambda hidden: (hidden, *(None for _ in found[1:]))

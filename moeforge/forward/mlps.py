"""Owns the MLPs of a dense model by themselves: run on rows of hidden states, one in memory."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from moeforge.configs import Config
from moeforge.dense import Anatomy, anatomy
from moeforge.forward.calls import layers_of
from moeforge.forward.skeleton import skeleton
from moeforge.module_weights import ModuleWeights, ReadTensor
from moeforge.workers import Share

if TYPE_CHECKING:
    from torch import Tensor, nn

_ROWS = 512
"""Rows per piece of work."""


def parts_of(layer: nn.Module, place: Anatomy) -> list[tuple[nn.Module, str]]:
    """Return owner and name of the modules of a layer that together are its MLP, in their order.

    One as a rule; some old types have none, and call two maps and an activation themselves.
    """
    names = ("fc1", "activation_fn", "fc2") if place.mlp == "fc1" else (place.mlp,)
    split = [name.rpartition(".") for name in names]
    return [(layer.get_submodule(owner), name) for owner, _, name in split]


def adds_residual(mlp: nn.Module) -> bool:
    """Say whether an MLP is called with the residual too, and adds it (bloom, mpt)."""
    return "residual" in inspect.signature(mlp.forward).parameters


class Mlps:
    """The MLPs of a dense model that transformers knows."""

    def __init__(self, config: Config, read: ReadTensor, device: str) -> None:
        model = skeleton(config)
        self._place = anatomy(config)
        self._layers = layers_of(model, self._place)
        self._weights = ModuleWeights(model, read, device)

    def run(self, layer: int, x_RH: Tensor, share: Share) -> Tensor:
        """Return the outputs [rows, H] of the MLP of `layer` for `x_RH`, without a residual.

        Raises:
            ValueError: a weight is not there.
        """
        import torch

        parts = parts_of(self._layers[layer], self._place)
        modules = [getattr(owner, name) for owner, name in parts]
        for module in modules:
            self._weights.load(module)
        pieces = x_RH.split(_ROWS)  # type: ignore[no-untyped-call]

        def work(number: int) -> Tensor:
            out: Any = pieces[number][None]
            residual = (torch.zeros_like(out),) if adds_residual(modules[0]) else ()
            for module in modules:
                out = module(out, *residual)
            made: Tensor = out[0]
            return made

        made = share(work, len(pieces)) if len(x_RH) else [x_RH]
        for module in modules:
            module.to("meta")
        return torch.cat(made)

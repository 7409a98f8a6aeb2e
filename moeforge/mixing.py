"""Owns what a mixture's layer computes, from the dense models it is made of, one MLP in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moeforge.gates import LayerGate
from moeforge.planners import Model, Planner
from moeforge.recipe import Expert, MoeRecipe
from moeforge.routing import shares
from moeforge.weights import Weights
from moeforge.workers import Share

if TYPE_CHECKING:
    from torch import Tensor

    from moeforge.forward import Mlps


class Mixing:
    """The experts of a mixture, run on the rows that a router sends to each of them."""

    def __init__(
        self, planner: Planner, recipe: MoeRecipe, *, sigmoid: bool, device: str, share: Share
    ) -> None:
        self._planner, self._recipe = planner, recipe
        self._sigmoid, self._device, self._share = sigmoid, device, share
        self._mlps: dict[str, Mlps] = {}

    def _model(self, expert: Expert, layer: int) -> Model:
        """Return the model whose MLP an expert is in a layer."""
        entry = expert.source_model
        if isinstance(entry, tuple):
            entry = next(
                part.model for part in entry if part.layer_range[0] <= layer < part.layer_range[1]
            )
        model = self._planner.model(entry, ("experts",))
        assert model is not None, "it was planned before"
        return model

    def _run(self, expert: Expert, layer: int, x_RH: Tensor) -> Tensor:
        from moeforge.forward import Mlps

        model = self._model(expert, layer)
        if model.label not in self._mlps:
            self._mlps[model.label] = Mlps(model.config, Weights(model).read, self._device)
        return self._mlps[model.label].run(layer, x_RH, self._share) * expert.residual_scale

    def run(self, layer: int, gate: LayerGate, x_RH: Tensor) -> Tensor:
        """Return what a layer's mixture makes of its inputs, both [rows, hidden] in float32.

        Args:
            layer: number of the layer.
            gate: its router; a row beyond the experts' is the sigmoid gate of the shared expert.
            x_RH: what its MLP would get.

        Raises:
            ValueError: a weight is not there.
        """
        import torch

        experts: Sequence[Expert] = self._recipe.experts
        weight = gate.weight.to(x_RH)
        logits_RE = x_RH @ weight[: len(experts)].T
        per_token = self._recipe.experts_per_token
        shares_RE = shares(logits_RE, per_token, sigmoid=self._sigmoid, bias=gate.bias)
        result = torch.zeros_like(x_RH)
        for number, expert in enumerate(experts):
            rows = shares_RE[:, number].nonzero()[:, 0]
            if len(rows):
                made = self._run(expert, layer, x_RH[rows])
                result.index_add_(0, rows, made * shares_RE[rows, number, None])
        gated = x_RH @ weight[len(experts) :].T if len(weight) > len(experts) else None
        for expert in self._recipe.shared_experts:
            made = self._run(expert, layer, x_RH)
            result += made if gated is None else made * gated.sigmoid()
        return result

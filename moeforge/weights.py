"""Owns reading tensors of a model, checkpoint or inline recipe, by module names and in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moeforge.dense import anatomy
from moeforge.engine.whole import evaluate
from moeforge.families._remote import REMOTE, named_as_modules
from moeforge.planners import Model
from moeforge.plans import Plan, PlannedTensor, Read, pieces

if TYPE_CHECKING:
    from torch import Tensor


class Weights:
    """Reads tensors of a model, checkpoint or inline recipe, in float32."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._plan = Plan("merge", (), model.config, model.sources, model.donor)
        known = model.config.get("model_type") in REMOTE
        self._named = named_as_modules(model.config, model.tensors) if known else model.tensors
        self._embeddings = anatomy(model.config).embeddings

    def read(self, name: str) -> Tensor:
        """Return a tensor in its shape, by the name of its module in transformers.

        Raises:
            KeyError: the model has no such tensor.
        """
        return self._whole(self._named[name])

    def stored(self, name: str) -> Tensor:
        """Return a tensor in its shape, by its name on disk."""
        return self._whole(self._model.tensors[name])

    def _whole(self, tensor: PlannedTensor) -> Tensor:
        import torch

        made = [evaluate(self._plan, expr, spec.numel) for expr, spec in pieces(tensor)]
        return torch.cat(made).reshape(tensor.spec.shape)

    def rows(self, ids: Sequence[int], name: str = "") -> Tensor:
        """Return rows `ids` of the embedding matrix, or of `name`, reading no more than it must.

        Raises:
            ValueError: the model has no such tensor.
        """
        import torch

        from moeforge.engine.buffers import torch_dtype

        tensor = self._named.get(name or self._embeddings)
        if tensor is None:
            raise ValueError(f"the model has no tensor {name or self._embeddings}")
        if not isinstance(tensor.expr, Read):
            return self._whole(tensor)[list(ids)]
        source = self._model.sources[tensor.expr.source]
        dtype = source.specs()[tensor.expr.name].dtype
        width = tensor.spec.shape[1]
        raw = bytearray(len(ids) * width * dtype.itemsize)
        size = width * dtype.itemsize
        for place, row in enumerate(ids):
            view = memoryview(raw)[place * size : (place + 1) * size]
            source.read(tensor.expr.name, row * size, view)
        return torch.frombuffer(raw, dtype=torch_dtype(dtype)).reshape(-1, width).float()

"""Owns bringing a mixture's base, its prompts and a gate mode together into router weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeforge import gates
from moeforge.configs import Config
from moeforge.dense import anatomy, hidden_size, max_positions
from moeforge.engine.whole import evaluate
from moeforge.errors import BuildError, Finding
from moeforge.families._remote import REMOTE, named_as_modules
from moeforge.gates import GateInput
from moeforge.planners import Model
from moeforge.plans import ROUTERS, Plan, PlannedTensor, Read, pieces
from moeforge.prepare import ExpertPrompt, Prepared
from moeforge.recipe import MoeRecipe
from moeforge.sources import Source
from moeforge.sources.memory import MemorySource
from moeforge.tensors import FLOAT32, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from moeforge.forward import LayerInputs


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

        from moeforge.engine.evaluate import torch_dtype

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


def compute_routers(
    prepared: Prepared, folder: Path, device: str, progress: Callable[[str, int, int], None]
) -> Source:
    """Return the router weights of a mixture as a source, in float32.

    Args:
        prepared: its recipe, planned.
        folder: holds the tokenizer of the result.
        device: torch device that the base runs on.
        progress: told the layers done.

    Raises:
        SourceError: the tokenizer cannot be used.
        BuildError: the base cannot be run, or the gates are not finite.
    """
    plan, planner, recipe = prepared.plan, prepared.planner, prepared.loaded.recipe
    assert isinstance(recipe, MoeRecipe)
    assert plan.experts is not None
    base = planner.model(recipe.base_model, ("base_model",))
    assert base is not None
    layers = plan.experts.layers
    hidden = hidden_size(base.config)
    assert hidden is not None
    weights = Weights(base)
    tokenized = _tokenize(base.config, folder, prepared.prompts)

    def walk() -> Iterator[Sequence[LayerInputs]]:
        from moeforge.forward import layer_inputs

        ids = [prompt.ids for prompt in tokenized]
        met = layer_inputs(base.config, ids, weights.read, weights.rows, device)
        for done, inputs in enumerate(met):
            progress("routers", done, layers[-1] + 1)
            if done in layers:
                yield inputs
            if done == layers[-1]:
                break  # nothing above it has a router
        progress("routers", layers[-1] + 1, layers[-1] + 1)

    experts, gated = len(plan.experts.labels), bool(plan.experts.shared_gates)
    shape = (len(layers), experts + gated, hidden)
    gate = gates.load(plan.experts.gate_mode)
    try:
        gates_LEH = gate.build(GateInput(shape, recipe.seed, tokenized, weights.rows, walk))
    except ValueError as error:
        raise BuildError(Finding(f"the router cannot be computed: {error}")) from error
    if not bool(gates_LEH.isfinite().all()):
        what = "the router weights are not finite: the base computes NaN or infinity on the prompts"
        raise BuildError(Finding(what, "Check the base model; its weights may be damaged."))
    tensors = dict(zip(plan.experts.routers, gates_LEH[:, :experts], strict=True))
    if gated:
        tensors.update(zip(plan.experts.shared_gates, gates_LEH[:, experts:], strict=True))
    return _as_source(tensors)


def _tokenize(base: Config, folder: Path, prompts: Sequence[ExpertPrompt]) -> Sequence[Any]:
    if not prompts:
        return []
    from moeforge.gates._tokenize import load_tokenizer, tokenize

    return tokenize(load_tokenizer(folder), prompts, max_positions(base))


def _as_source(gates: Mapping[str, Tensor]) -> Source:
    import torch

    def raw(gate: Tensor) -> bytes:
        return bytes(gate.contiguous().float().view(torch.uint8).flatten().numpy())

    specs = {name: TensorSpec(FLOAT32, tuple(gate.shape)) for name, gate in gates.items()}
    return MemorySource(ROUTERS, {n: (specs[n], raw(gate)) for n, gate in gates.items()})

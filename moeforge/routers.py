"""Owns bringing a mixture's models, its prompts and a gate mode together into router weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeforge import families, gates
from moeforge.configs import n_layers
from moeforge.dense import hidden_size, max_positions
from moeforge.errors import BuildError, Finding
from moeforge.gates import GateInput, Gates, LayerFit, LayerGate, TokenizedPrompt
from moeforge.planners import Model
from moeforge.plans import ROUTERS, Experts, Plan
from moeforge.prepare import Prepared
from moeforge.recipe import REMOTE, MoeRecipe, Recipe, Reference
from moeforge.sources import Source
from moeforge.sources.memory import MemorySource
from moeforge.tensors import FLOAT32, TensorSpec
from moeforge.weights import Weights
from moeforge.workers import Share, workers

if TYPE_CHECKING:
    from torch import Tensor

    from moeforge.forward import LayerInputs

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Routers:
    """Router weights, and what is known of them.

    Attributes:
        source: holds them, in float32, by the names that the plan gives them.
        fits: for each layer with experts what a fit found out; empty where nothing was fitted.
    """

    source: Source
    fits: tuple[LayerFit, ...]


def compute_routers(prepared: Prepared, folder: Path, device: str, progress: Progress) -> Routers:
    """Return the router weights of a mixture.

    Args:
        prepared: its recipe, planned.
        folder: holds the tokenizer of the result.
        device: torch device that models run on.
        progress: told the layers done.

    Raises:
        SourceError: the tokenizer cannot be used.
        BuildError: a model cannot be run, or the gates are not finite.
    """
    experts = prepared.plan.experts
    assert experts is not None
    try:
        with gate_input(prepared, folder, device, progress) as data:
            made = gates.load(experts.gate_mode).build(data)
    except ValueError as error:
        raise BuildError(Finding(f"the router cannot be computed: {error}")) from error
    found = made if isinstance(made, Gates) else Gates(made)
    if not bool(found.weights_LEH.isfinite().all()):
        what = "the router weights are not finite: the base computes NaN or infinity on the prompts"
        raise BuildError(Finding(what, "Check the base model; its weights may be damaged."))
    return Routers(_as_source(_named(experts, found, prepared.plan)), found.fits)


@contextmanager
def gate_input(
    prepared: Prepared, folder: Path, device: str, progress: Progress
) -> Iterator[GateInput]:
    """Give what a gate mode works from, and threads for it; arguments as in `compute_routers`."""
    maker = _Maker(prepared, folder, device, progress)
    with workers(maker.hidden, device) as share:
        yield maker.input(share)


class _Maker:
    """Makes the input of a gate mode from a recipe that can be built."""

    def __init__(self, prepared: Prepared, folder: Path, device: str, progress: Progress) -> None:
        self._planner, self._plan = prepared.planner, prepared.plan
        self._device, self._progress = device, progress
        recipe, experts = prepared.loaded.recipe, prepared.plan.experts
        assert isinstance(recipe, MoeRecipe)
        assert experts is not None
        self._recipe, self._experts = recipe, experts
        self._base = self._model(recipe.base_model)
        self._weights = Weights(self._base)
        hidden = hidden_size(self._base.config)
        assert hidden is not None, "the planner has asked for it"
        self.hidden = hidden
        remote = experts.family == REMOTE
        self._sigmoid = not remote and families.load(experts.family).score == "sigmoid"
        self._tokenized: Sequence[TokenizedPrompt] = ()
        if prepared.prompts:
            from moeforge.gates._tokenize import load_tokenizer, tokenize

            longest = max_positions(self._base.config)
            self._tokenized = tokenize(load_tokenizer(folder), prepared.prompts, longest)

    def _model(self, entry: Reference | Recipe) -> Model:
        model = self._planner.model(entry, ("base_model",))
        assert model is not None, "it was planned before"
        return model

    def input(self, share: Share) -> GateInput:
        """Return what the gate mode works from."""
        given, experts = self._recipe.gate_parameters, self._experts
        gated = bool(experts.shared_gates)
        on_policy = given.on_policy
        if on_policy is None:
            base = self._recipe.base_model
            on_policy = isinstance(getattr(base, "model", base), Recipe)
        return GateInput(
            (len(experts.layers), len(experts.labels) + gated, self.hidden),
            self._recipe.seed,
            self._with_losses(share),
            self._weights.rows,
            lambda: self._walk(share),
            lambda fit: self._grow(fit, share),
            gated,
            self._sigmoid,
            experts.per_token,
            bool(experts.biases),
            on_policy,
            given,
            share,
        )

    def _walk(self, share: Share) -> Iterator[Sequence[LayerInputs]]:
        from moeforge.forward import layer_inputs

        layers = self._experts.layers
        met = layer_inputs(
            self._base.config,
            [prompt.ids for prompt in self._tokenized],
            self._weights.read,
            self._weights.rows,
            self._device,
            share=share,
        )
        for done, inputs in enumerate(met):
            self._progress("routers", done, layers[-1] + 1)
            if done in layers:
                yield inputs
            if done == layers[-1]:
                break  # nothing above it has a router
        self._progress("routers", layers[-1] + 1, layers[-1] + 1)

    def _grow(self, fit: Callable[[Sequence[LayerInputs]], LayerGate], share: Share) -> None:
        import torch

        from moeforge.engine.buffers import torch_dtype
        from moeforge.forward import grow
        from moeforge.mixing import Mixing

        layers = self._experts.layers
        mixing = Mixing(
            self._planner, self._recipe, sigmoid=self._sigmoid, device=self._device, share=share
        )
        stored = {tensor.name: tensor.spec.dtype for tensor in self._plan.tensors}
        dtype = torch_dtype(stored[self._experts.routers[0]])

        def mixed(layer: int, inputs: Sequence[LayerInputs], x_RH: Tensor) -> Tensor | None:
            self._progress("routers", layer, layers[-1] + 1)
            if layer not in layers:
                return None
            gate = fit(inputs)
            if layer == layers[-1]:
                return torch.zeros_like(x_RH)  # nothing above it has a router
            # What is written is rounded, and decides what the layers above will meet.
            written = replace(gate, weight=gate.weight.to(dtype).float())
            return mixing.run(layer, written, x_RH)

        ids = [prompt.ids for prompt in self._tokenized]
        read, rows = self._weights.read, self._weights.rows
        grow(self._base.config, ids, read, rows, mixed, self._device, share, layers[-1] + 1)
        self._progress("routers", layers[-1] + 1, layers[-1] + 1)

    def _with_losses(self, share: Share) -> Sequence[TokenizedPrompt]:
        """Return the prompts; those without an owner with the loss of each expert's model."""
        from moeforge.forward import losses

        loose = [i for i, prompt in enumerate(self._tokenized) if prompt.expert < 0]
        if not loose:
            return self._tokenized
        models = [self._model(expert.source_model) for expert in self._recipe.experts]
        steps, done, found = sum(n_layers(m.config) or 0 for m in models), 0, list[list[float]]()

        def told() -> None:
            nonlocal done
            done += 1
            self._progress("labels", done, steps)

        ids = [self._tokenized[i].ids for i in loose]
        for model in models:
            weights = Weights(model)
            read, rows = weights.read, weights.rows
            found.append(losses(model.config, ids, read, rows, self._device, share, told))
        whole = list(self._tokenized)
        for i, own in zip(loose, zip(*found, strict=True), strict=True):
            whole[i] = replace(whole[i], losses=tuple(own))
        return whole


def _named(experts: Experts, found: Gates, plan: Plan) -> dict[str, Tensor]:
    """Return what a gate mode has made by the names of the plan, in the shapes there."""
    count = len(experts.labels)
    tensors = dict(zip(experts.routers, found.weights_LEH[:, :count], strict=True))
    if experts.shared_gates:
        tensors.update(zip(experts.shared_gates, found.weights_LEH[:, count:], strict=True))
    if experts.biases:
        assert found.biases_LE is not None, "the gate mode was asked for them"
        shapes = {tensor.name: tensor.spec.shape for tensor in plan.tensors}
        for name, bias_E in zip(experts.biases, found.biases_LE, strict=True):
            tensors[name] = bias_E.reshape(shapes[name])
    return tensors


def _as_source(gates: Mapping[str, Tensor]) -> Source:
    import torch

    def raw(gate: Tensor) -> bytes:
        return bytes(gate.contiguous().float().view(torch.uint8).flatten().numpy())

    specs = {name: TensorSpec(FLOAT32, tuple(gate.shape)) for name, gate in gates.items()}
    return MemorySource(ROUTERS, {n: (specs[n], raw(gate)) for n, gate in gates.items()})


def packed(routers: Routers) -> bytes:
    """Return router weights and what is known of them as bytes: a line of JSON, and the weights."""
    specs, data = routers.source.specs(), bytearray()
    for name, spec in specs.items():
        part = bytearray(spec.nbytes)
        routers.source.read(name, 0, memoryview(part))
        data += part
    shapes = {name: spec.shape for name, spec in specs.items()}
    fits = [asdict(fit) for fit in routers.fits]
    return json.dumps({"shapes": shapes, "fits": fits}).encode() + b"\n" + data


def unpacked(raw: bytes) -> Routers:
    """Return what `packed` was given."""
    line, _, data = raw.partition(b"\n")
    known: Any = json.loads(line)
    tensors: dict[str, tuple[TensorSpec, bytes]] = {}
    for name, shape in known["shapes"].items():
        spec = TensorSpec(FLOAT32, tuple(shape))
        tensors[name], data = (spec, data[: spec.nbytes]), data[spec.nbytes :]
    tuples: list[dict[str, Any]] = [
        {key: tuple(value) if isinstance(value, list) else value for key, value in fit.items()}
        for fit in known["fits"]
    ]
    return Routers(MemorySource(ROUTERS, tensors), tuple(LayerFit(**fit) for fit in tuples))

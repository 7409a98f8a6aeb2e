"""Owns running prompts through a dense model, layer after layer, and through a mixture that grows.

Prompts run one by one, without padding: nothing depends on the side or the mask of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeforge.configs import Config
from moeforge.dense import anatomy, hidden_size
from moeforge.forward.calls import Stop, convention, finish, layers_of, record
from moeforge.forward.mlps import adds_residual, parts_of
from moeforge.forward.skeleton import skeleton
from moeforge.module_weights import ModuleWeights, ReadRows, ReadTensor
from moeforge.workers import Share, workers

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class LayerInputs:
    """What one layer saw of one prompt.

    Attributes:
        residual_TH: input of the layer [tokens, hidden].
        mlp_TH: input of its MLP [tokens, hidden]: what a router in its place would see.
    """

    residual_TH: Tensor
    mlp_TH: Tensor


Mixed = Callable[[int, Sequence[LayerInputs], "Tensor"], "Tensor | None"]
"""Given a layer's number, what it saw of each prompt, and all rows [rows, hidden] that enter its
MLP: what stands for the outputs [rows, hidden]; None where the dense MLP stays."""


def _of_tokens(states: Tensor, tokens: int) -> Tensor:
    """Return hidden states [..., tokens, hidden] as [tokens, hidden].

    Of several streams (gemma3n) the first is what layers read; what a model puts before the prompt
    by itself (cpmant) is left out.
    """
    return states.reshape(-1, *states.shape[-2:])[0, -tokens:]


class _Walk:
    """The hidden states of all prompts, carried through a dense model layer by layer."""

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Sequence[int]],
        read: ReadTensor,
        read_rows: ReadRows,
        device: str,
        attention: str | None,
        share: Share,
    ) -> None:
        self.prompts, self.device, self._share = prompts, device, share
        self.model, self.place = skeleton(config, attention), anatomy(config)
        self.layers = layers_of(self.model, self.place)
        self.weights = ModuleWeights(self.model, read, device)
        self._before_layers(read_rows)
        (first,) = record(self.model, self.layers, prompts[0], None, device)
        self.weights.load(self.layers[0])
        self.returns = convention(self.layers[0], first)
        self._calls = [
            record(self.model, self.layers, prompt, self.returns, device) for prompt in prompts
        ]
        self.hidden = [calls[0].hidden for calls in self._calls]
        self._now = threading.local()  # the number of the prompt that a thread is running

    def _before_layers(self, read_rows: ReadRows) -> None:
        """Load what is not a layer; of tables with a row for each token, rows that occur."""
        from torch import nn

        tables = [
            module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Embedding)
            # Gemma has a second one, embed_tokens_per_layer, that is larger than the rest.
            and (f"{name}.weight" == self.place.embeddings or ".embed_tokens" in name)
        ]
        decoder: Any = self.model.base_model
        self.weights.load(decoder, [self.layers, *tables])
        for table in tables:
            self.weights.rows_only(table, read_rows)

    def __iter__(self) -> Iterator[tuple[int, nn.Module]]:
        """Yield number and layer, with its weights."""
        for index, layer in enumerate(self.layers):
            self.weights.load(layer)
            yield index, layer
            layer.to("meta")

    def _each(self, index: int, layer: nn.Module) -> None:
        """Run every prompt through a layer."""
        import torch

        def work(number: int) -> None:
            call = self._calls[number][index]
            self._now.number = number
            after: Any = layer(self.hidden[number], *call.args, **call.kwargs)
            self.hidden[number] = after if isinstance(after, torch.Tensor) else after[0]

        self._share(work, len(self.prompts))

    def run(self, index: int, layer: nn.Module) -> list[LayerInputs]:
        """Carry the prompts through a layer; return what it met."""
        before, seen = list(self.hidden), dict[int, Any]()

        def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen[self._now.number] = inputs[0]

        hook = layer.get_submodule(self.place.mlp).register_forward_pre_hook(look)
        self._each(index, layer)
        hook.remove()
        return self._inputs(before, seen)

    def _inputs(self, before: list[Tensor], seen: dict[int, Any]) -> list[LayerInputs]:
        counts = [len(prompt) for prompt in self.prompts]
        return [
            LayerInputs(_of_tokens(before[n], count), _of_tokens(seen[n], count))
            for n, count in enumerate(counts)
        ]

    def up_to_mlp(self, index: int, layer: nn.Module) -> tuple[list[LayerInputs], list[Tensor]]:
        """Return what a layer and its MLP meet, and all that enters the MLP for each prompt."""
        seen = dict[int, Any]()

        def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen[self._now.number] = inputs[0]
            raise Stop

        def work(number: int) -> None:
            call = self._calls[number][index]
            self._now.number = number
            with suppress(Stop):
                layer(self.hidden[number], *call.args, **call.kwargs)

        hook = layer.get_submodule(self.place.mlp).register_forward_pre_hook(look)
        self._share(work, len(self.prompts))
        hook.remove()
        return self._inputs(self.hidden, seen), [seen[n] for n in range(len(self.prompts))]

    def run_with(self, index: int, layer: nn.Module, outputs: Sequence[Tensor]) -> None:
        """Carry the prompts through a layer in which `outputs` are what the MLP returns."""
        from torch import nn

        now = self._now
        (owner, name), *others = parts_of(layer, self.place)
        added = adds_residual(getattr(owner, name))

        class Known(nn.Module):
            def forward(self, x: Tensor, *more: Tensor) -> Tensor:
                known: Tensor = outputs[now.number].reshape(x.shape)
                return known + more[0] if added else known

        setattr(owner, name, Known())
        for place, rest in others:
            setattr(place, rest, nn.Identity())
        self._each(index, layer)


def layer_inputs(
    config: Config,
    prompts: Sequence[Sequence[int]],
    read: ReadTensor,
    read_rows: ReadRows,
    device: str = "cpu",
    attention: str | None = None,
    share: Share | None = None,
) -> Iterator[list[LayerInputs]]:
    """Run a dense model over `prompts` and yield, layer by layer, what each prompt's tokens meet.

    The weights of one layer and the hidden states of all prompts are in memory.

    Args:
        config: config.json of a dense model that transformers knows.
        prompts: token ids.
        read: gives weights.
        read_rows: gives embedding rows.
        device: torch device.
        attention: transformers' `attn_implementation`; None for what it takes by itself.
        share: gives the prompts to threads; None makes them.

    Raises:
        ValueError: transformers does not know the model type, or has no such layers in it.
    """
    import torch

    if share is None:
        with workers(hidden_size(config) or 0, device) as own:
            yield from layer_inputs(config, prompts, read, read_rows, device, attention, own)
        return
    with torch.no_grad():
        walk = _Walk(config, prompts, read, read_rows, device, attention, share)
        for index, layer in walk:
            yield walk.run(index, layer)


def grow(
    config: Config,
    prompts: Sequence[Sequence[int]],
    read: ReadTensor,
    read_rows: ReadRows,
    mixed: Mixed,
    device: str,
    share: Share,
    depth: int,
) -> None:
    """Run prompts through a dense model whose MLPs are replaced, layer by layer, on the way.

    What a layer's MLP meets depends on the layers below only. So one pass sees the mixture exactly
    as it will be: `mixed` is asked once for each layer, and its answer is what goes on. Attention
    is computed twice.

    Args:
        config: as in `layer_inputs`, and so are `prompts`, `read`, `read_rows`.
        prompts: token ids.
        read: gives weights.
        read_rows: gives embedding rows.
        mixed: computes what stands for an MLP.
        device: torch device.
        share: gives the prompts to threads.
        depth: layers to run; of the last, what comes after the MLP is not.

    Raises:
        ValueError: transformers does not know the model type, or has no such layers in it.
    """
    import torch

    with torch.no_grad():
        walk = _Walk(config, prompts, read, read_rows, device, None, share)
        for index, layer in walk:
            inputs, entering = walk.up_to_mlp(index, layer)
            flat = [x.reshape(-1, x.shape[-1]) for x in entering]
            outputs = mixed(index, inputs, torch.cat(flat))
            if index + 1 == depth:
                break
            if outputs is None:
                walk.run(index, layer)
            else:
                walk.run_with(index, layer, outputs.split([len(x) for x in flat]))  # type: ignore[no-untyped-call]


def losses(
    config: Config,
    prompts: Sequence[Sequence[int]],
    read: ReadTensor,
    read_rows: ReadRows,
    device: str,
    share: Share,
    progress: Callable[[], None] = lambda: None,
) -> list[float]:
    """Return for each prompt the mean cross entropy of a dense model in nats per predicted token.

    Zero for prompts of one token, of which nothing is predicted.

    Args:
        config: as in `layer_inputs`, and so are `prompts`, `read`, `read_rows`.
        prompts: token ids.
        read: gives weights.
        read_rows: gives embedding rows.
        device: torch device.
        share: gives the prompts to threads.
        progress: called after each layer.

    Raises:
        ValueError: transformers does not know the model type, or has no such layers in it.
    """
    import torch

    with torch.no_grad():
        walk = _Walk(config, prompts, read, read_rows, device, None, share)
        model: Any = walk.model
        for index, layer in walk:
            walk.run(index, layer)
            progress()
        _load_head(walk, read)
        made = []
        for prompt, hidden in zip(prompts, walk.hidden, strict=True):
            logits = finish(model, walk.layers, prompt, walk.returns, hidden, device)
            logits = logits[0, -len(prompt) : -1].float()
            wanted = torch.tensor(prompt[1:], dtype=torch.long)
            entropy = torch.nn.functional.cross_entropy(logits, wanted.to(device), reduction="sum")
            made.append(float(entropy) / max(len(prompt) - 1, 1))
        return made


def _load_head(walk: _Walk, read: ReadTensor) -> None:
    """Load what is outside the decoder; checkpoints that tie their head to embeddings lack it."""
    model: Any = walk.model
    head = model.get_output_embeddings()
    names = [f"{name}.weight" for name, module in model.named_modules() if module is head]

    def tied(name: str) -> Tensor:
        try:
            return read(name)
        except KeyError:
            if not model.config.tie_word_embeddings or name not in names:
                raise
            return read(walk.place.embeddings)

    ModuleWeights(model, tied, walk.device).load(model, [model.base_model])

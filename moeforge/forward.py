"""Owns running a dense model layer by layer from disk, so that one layer is in memory at a time.

Knows transformers' module layout (a list of decoder layers, each with an `mlp`); knows nothing of
recipes, gates or where weights come from: a `read` function gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeforge.configs import Config

if TYPE_CHECKING:
    from torch import Tensor, nn

ReadTensor = Callable[[str], "Tensor"]
"""Returns a tensor of the model by its name on disk, in float32, in its shape."""
ReadRows = Callable[[Sequence[int]], "Tensor"]
"""Returns rows of the embedding matrix, [rows, hidden] in float32."""

_SMALL = 512
"""Hidden size up to which a prompt's matrix products are too small to share among threads."""


@dataclass(frozen=True)
class LayerInputs:
    """What one layer saw of one prompt.

    Attributes:
        residual_TH: input of the layer [tokens, hidden].
        mlp_TH: input of its MLP [tokens, hidden]: what a router in its place would see.
    """

    residual_TH: Tensor
    mlp_TH: Tensor


class _Stop(Exception):
    """Ends a forward pass once all layers have told their arguments."""


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' log lines and progress bars: errors are raised anyway."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def skeleton(config: Config, attention: str = "sdpa") -> nn.Module:
    """Return transformers' causal language model for `config`, without weights (on "meta").

    Buffers, such as rotary frequencies, are real.

    Raises:
        ValueError: transformers does not know the model type.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"the installed transformers does not know {kind} models")
    with quiet(), init_empty_weights(include_buffers=False):
        model: nn.Module = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING[kind].from_dict(dict(config)),
            attn_implementation=attention,
            dtype=torch.float32,
        )
    return model.eval()


def load_dense(config: Config, read: ReadTensor) -> nn.Module:
    """Return the whole dense model in memory, in float32, with the weights that `read` gives."""
    model = skeleton(config)
    model.load_state_dict(
        {name: read(name) for name, _ in model.named_parameters()}, strict=False, assign=True
    )
    tie: Any = getattr(model, "tie_weights", None)
    if tie:
        tie()
    lost = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if lost:
        raise ValueError(f"no weights for {', '.join(lost[:3])}")
    return model


def _layers(decoder: nn.Module) -> nn.ModuleList:
    layers: nn.ModuleList = decoder.layers  # type: ignore[assignment]
    return layers


def _recorder(layer: nn.Module, calls: list[dict[str, Any]], last: bool) -> nn.Module:
    """Return a stand-in for `layer` that writes down how it is called and changes nothing."""
    from torch import nn

    class Recorder(nn.Module):
        def __getattr__(self, name: str) -> Any:
            # Models choose masks by attributes of the layer, such as its attention_type.
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(layer, name)

        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            calls.append({"hidden": hidden_states, "args": args, "kwargs": kwargs})
            if last:
                raise _Stop
            return hidden_states

    return Recorder()


def _record(
    model: nn.Module, prompts: Sequence[Sequence[int]], read_rows: ReadRows, device: str
) -> list[list[dict[str, Any]]]:
    """Return, for each prompt, how the model would call each of its layers.

    Only the embedding rows of tokens that occur are read; ids are renumbered to match.
    """
    import torch
    from torch import nn

    decoder: Any = model.base_model
    used = sorted({token for prompt in prompts for token in prompt})
    place = {token: index for index, token in enumerate(used)}
    embedding = decoder.embed_tokens
    embedding.weight = nn.Parameter(read_rows(used).to(device), requires_grad=False)
    embedding.num_embeddings, embedding.padding_idx = len(used), None
    for buffer in decoder.modules():
        for name, value in list(buffer.named_buffers(recurse=False)):
            buffer._buffers[name] = value.to(device)
    real = _layers(decoder)
    calls: list[dict[str, Any]] = []
    decoder.layers = nn.ModuleList(
        _recorder(layer, calls, index == len(real) - 1) for index, layer in enumerate(real)
    )
    recorded = []
    for prompt in prompts:
        calls.clear()
        ids = torch.tensor([[place[token] for token in prompt]], device=device)
        try:
            decoder(input_ids=ids, use_cache=False)
        except _Stop:
            recorded.append(list(calls))
    decoder.layers = real
    embedding.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    return recorded


@contextmanager
def _threads(config: Config) -> Iterator[None]:
    """Use one thread for models so small that handing out the work takes longer than doing it."""
    import torch

    before = torch.get_num_threads()
    if config.get("hidden_size", _SMALL) < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def layer_inputs(
    config: Config,
    prompts: Sequence[Sequence[int]],
    read: ReadTensor,
    read_rows: ReadRows,
    device: str = "cpu",
    attention: str = "sdpa",
) -> Iterator[list[LayerInputs]]:
    """Run a dense model over `prompts` and yield, layer by layer, what each prompt's tokens meet.

    Prompts run one by one, without padding: nothing depends on the side or the mask of it. The
    weights of one layer and the hidden states of all prompts are in memory.

    Args:
        config: config.json of a dense model that transformers knows.
        prompts: token ids.
        read: gives the weights of `model.layers.*`.
        read_rows: gives embedding rows.
        device: torch device.
        attention: transformers' `attn_implementation`.

    Raises:
        ValueError: transformers does not know the model type.
    """
    import torch
    from torch import nn

    with torch.no_grad(), _threads(config):
        model = skeleton(config, attention)
        recorded = _record(model, prompts, read_rows, device)
        hidden = [calls[0]["hidden"] for calls in recorded]
        for index, layer in enumerate(_layers(model.base_model)):  # type: ignore[arg-type]
            prefix = f"model.layers.{index}."
            for name, parameter in list(layer.named_parameters()):
                owner = layer.get_submodule(name.rpartition(".")[0])
                weight = read(prefix + name).reshape(parameter.shape).to(device)
                setattr(owner, name.rpartition(".")[2], nn.Parameter(weight, requires_grad=False))
            seen: list[Tensor] = []
            hook = layer.mlp.register_forward_pre_hook(  # type: ignore[union-attr]
                lambda module, inputs, seen=seen: seen.append(inputs[0])
            )
            inputs = []
            for number, calls in enumerate(recorded):
                call = calls[index]
                before = hidden[number]
                after = layer(before, *call["args"], **call["kwargs"])
                hidden[number] = after[0] if isinstance(after, tuple) else after
                inputs.append(LayerInputs(before[0], seen.pop()[0]))
            hook.remove()
            yield inputs
            layer.to("meta")

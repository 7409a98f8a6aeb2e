"""Owns running a dense model layer by layer from disk, so that one layer is in memory at a time.

Knows transformers' modules, and by `dense.ANATOMY` which of them are layers and MLPs; knows nothing
of recipes, gates or where weights come from: `read` functions give them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeforge.configs import Config
from moeforge.dense import Anatomy, anatomy, hidden_size
from moeforge.module_weights import ModuleWeights, ReadRows, ReadTensor

if TYPE_CHECKING:
    from torch import Tensor, nn

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


def skeleton(config: Config, attention: str | None = None) -> nn.Module:
    """Return transformers' causal language model for `config`, without weights (on "meta").

    Buffers, such as rotary frequencies, are real.

    Args:
        config: config.json.
        attention: transformers' `attn_implementation`; None for what it takes by itself.

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
            CONFIG_MAPPING[kind].from_dict(_plain_floats(config)),
            attn_implementation=attention,
            dtype=torch.float32,
        )
    return model.eval()


def _plain_floats(value: Any) -> Any:
    """Return JSON data in which transformers' {"__float__": "Infinity"} is a float."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _plain_floats(each) for key, each in value.items()}
    return [_plain_floats(each) for each in value] if isinstance(value, list) else value


def load_dense(config: Config, names: Iterable[str], read: ReadTensor) -> nn.Module:
    """Return the whole model in memory, in float32.

    Args:
        config: its config.json; transformers must know the model type.
        names: its tensors, as they are called on disk.
        read: gives them, by these names.

    Raises:
        ValueError: transformers does not know the model type, or misses a tensor.
    """
    import torch

    model: Any = skeleton(config)
    with quiet():
        loaded, info = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict={name: read(name) for name in names},
            dtype=torch.float32,
            output_loading_info=True,
        )
    if lost := sorted(info["missing_keys"]):
        raise ValueError(f"no weights for {', '.join(lost[:3])}")
    whole: nn.Module = loaded.eval()
    return whole


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


def _layers(model: nn.Module, place: Anatomy) -> nn.ModuleList:
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


Returns = Callable[["Tensor"], Any]
"""What a layer returns, given the hidden states: models unpack that before the next layer."""


def _recorder(layer: nn.Module, calls: list[Call], returns: Returns | None) -> nn.Module:
    """Return a stand-in for `layer` that writes down how it is called and changes nothing.

    Args:
        layer: the real one.
        calls: receives the call.
        returns: None ends the forward pass.
    """
    from torch import nn

    class Recorder(nn.Module):
        def __getattr__(self, name: str) -> Any:
            # Models choose masks by attributes of the layer, such as its attention_type.
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(layer, name)

        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append(Call(hidden_states, args, kwargs))
            if returns is None:
                raise _Stop
            return returns(hidden_states)

    return Recorder()


def _record(
    model: nn.Module,
    layers: nn.ModuleList,
    prompt: Sequence[int],
    returns: Returns | None,
    device: str,
) -> list[Call]:
    """Return how the model would call its layers; the first only, where `returns` is None."""
    import torch

    decoder: Any = model.base_model
    real, calls = list(layers), list[Call]()
    for index, layer in enumerate(real):
        layers[index] = _recorder(layer, calls, returns if index < len(real) - 1 else None)
    with suppress(_Stop):
        decoder(input_ids=torch.tensor([prompt]).to(device), use_cache=False)
    for index, layer in enumerate(real):
        layers[index] = layer
    return calls


def _returns(layer: nn.Module, call: Call) -> Returns:
    """Try how `layer`, whose weights are there, returns the hidden states: alone, or with more."""
    import torch

    found = layer(call.hidden, *call.args, **call.kwargs)
    if isinstance(found, torch.Tensor):
        return lambda hidden: hidden
    return lambda hidden: (hidden, *(None for _ in found[1:]))


def _of_tokens(states: Tensor, tokens: int) -> Tensor:
    """Return hidden states [..., tokens, hidden] as [tokens, hidden].

    Of several streams (gemma3n) the first is what layers read; what a model puts before the prompt
    by itself (cpmant) is left out.
    """
    return states.reshape(-1, *states.shape[-2:])[0, -tokens:]


@contextmanager
def _threads(config: Config) -> Iterator[None]:
    """Use one thread for models so small that handing out the work takes longer than doing it."""
    import torch

    before = torch.get_num_threads()
    if (hidden_size(config) or _SMALL) < _SMALL:
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
    attention: str | None = None,
) -> Iterator[list[LayerInputs]]:
    """Run a dense model over `prompts` and yield, layer by layer, what each prompt's tokens meet.

    Prompts run one by one, without padding: nothing depends on the side or the mask of it. The
    weights of one layer and the hidden states of all prompts are in memory.

    Args:
        config: config.json of a dense model that transformers knows.
        prompts: token ids.
        read: gives weights.
        read_rows: gives embedding rows.
        device: torch device.
        attention: transformers' `attn_implementation`; None for what it takes by itself.

    Raises:
        ValueError: transformers does not know the model type, or has no such layers in it.
    """
    import torch

    with torch.no_grad(), _threads(config):
        model, place = skeleton(config, attention), anatomy(config)
        layers, weights = _layers(model, place), ModuleWeights(model, read, device)
        _before_layers(model, layers, weights, read_rows, place)
        (first,) = _record(model, layers, prompts[0], None, device)
        weights.load(layers[0])
        returns = _returns(layers[0], first)
        recorded = [_record(model, layers, prompt, returns, device) for prompt in prompts]
        hidden = [calls[0].hidden for calls in recorded]
        for index, layer in enumerate(layers):
            weights.load(layer)
            seen: list[Tensor] = []
            hook = layer.get_submodule(place.mlp).register_forward_pre_hook(
                lambda module, inputs, seen=seen: seen.append(inputs[0])
            )
            inputs = []
            for number, (calls, prompt) in enumerate(zip(recorded, prompts, strict=True)):
                call = calls[index]
                before = hidden[number]
                after = layer(before, *call.args, **call.kwargs)
                hidden[number] = after if isinstance(after, torch.Tensor) else after[0]
                inputs.append(
                    LayerInputs(*(_of_tokens(x, len(prompt)) for x in (before, seen.pop())))
                )
            hook.remove()
            yield inputs
            layer.to("meta")


def _before_layers(
    model: nn.Module,
    layers: nn.ModuleList,
    weights: ModuleWeights,
    read_rows: ReadRows,
    place: Anatomy,
) -> None:
    """Load what comes before the layers; of tables with a row for each token, rows that occur."""
    from torch import nn

    tables = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        # Gemma has a second one, embed_tokens_per_layer, that is larger than the rest.
        and (f"{name}.weight" == place.embeddings or ".embed_tokens" in name)
    ]
    decoder: Any = model.base_model
    weights.load(decoder, [layers, *tables])
    for table in tables:
        weights.rows_only(table, read_rows)

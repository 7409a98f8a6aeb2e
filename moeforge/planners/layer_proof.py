"""Owns the proof that the layers of a stack are built as those that they come from.

Builds transformers' own modules without weights, for the sources and for the stack, and compares
them layer by layer; knows no family by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moeforge.configs import Config, plain_floats
from moeforge.planners.layer_keys import LayerFieldError, Origin
from moeforge.planners.layer_lists import depth_of, is_uniform, lists, stacked_config

if TYPE_CHECKING:
    from torch import nn

_OWN_NUMBER = {"layer_idx", "layer_id", "layer_number", "layer_index"}
"""What a layer calls its number, which says where its cache lies."""
_NOTHING = object()
_LARGE = 1 << 22
"""Elements from which on a new tensor is a weight, whose numbers do not matter."""
_DEPTH = {"num_hidden_layers", "num_layers", "n_layer", "n_layers"}

Facts = dict[str, Any]
"""What is known of a layer: parameters' shapes, buffers, classes and plain attributes, by path."""


def proven(donor: Config, layers: Sequence[Origin], stored: set[str]) -> tuple[Config, list[str]]:
    """Return the config of a stack of `layers`, and sentences that its user should know.

    Args:
        donor: config that everything not per layer comes from.
        layers: for each output layer, the one that it comes from.
        stored: tensors of the layers as they are on disk, without layer and what stands before.

    Raises:
        LayerFieldError: the config cannot say what the stack is, or its layers would not be built
            as those that they come from.
    """
    config = stacked_config(donor, layers)
    if is_uniform(donor):
        return config, []
    kind = str(donor.get("model_type"))
    if donor.get("is_encoder_decoder") or not _is_decoder(kind):
        what = f"whether the layers of {kind} depend on their number was not checked: "
        return config, [f"{what}it is no decoder that the installed transformers knows"]
    return config, unlike(config, donor, layers, stored)


def _is_decoder(kind: str) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def unlike(result: Config, donor: Config, layers: Sequence[Origin], stored: set[str]) -> list[str]:
    """Return sentences that say how settings of whole models differ, which stacks do not keep.

    Args:
        result: the config of the stack.
        donor: the config that it was made from.
        layers: for each output layer, the one that it comes from.
        stored: tensors of the layers as they are on disk, without layer and what stands before.

    Raises:
        LayerFieldError: a layer of the stack would not be built as the one that it comes from; or
            transformers has no single list of layers to compare.
    """
    models: dict[int, list[Facts]] = {}
    labels: dict[int, str] = {}
    mine, around = facts(donor)
    known = [(donor, mine)]
    for origin in layers:
        if id(origin.config) not in models:
            # Fine-tunes of one model have one config, and large skeletons take seconds.
            alike = next((found for config, found in known if config == origin.config), None)
            if alike is None:
                alike = facts(origin.config)[0]
                known.append((origin.config, alike))
            models[id(origin.config)] = alike
            labels[id(origin.config)] = origin.label
    made, around_made = facts(result)
    _same_around(around, around_made)
    constants = list(map(_constant, models.values()))
    ours = _constant(mine)
    settings = {
        path
        for theirs in constants
        for path in ours.keys() & theirs.keys()
        if not isinstance(ours[path], tuple) and not same(ours[path], theirs[path])
    }
    for number, (layer, origin) in enumerate(zip(made, layers, strict=True)):
        theirs = models[id(origin.config)][origin.index]
        for path in sorted(layer.keys() | theirs.keys()):
            is_, was = layer.get(path, _NOTHING), theirs.get(path, _NOTHING)
            if path in settings or same(is_, was):
                continue
            sized_alike = _same_shape(is_, was)
            if path in stored and sized_alike:
                continue  # a buffer that the checkpoint has
            what = f"layer {number} of the stack would have {path} {_show(is_)}"
            others = " of other numbers" if sized_alike else ""
            raise LayerFieldError(f"{what}, where {origin} has {_show(was)}{others}")
    return [
        f"{labels[key]} has {path} {_show(theirs[path])} in every layer, the result "
        f"{_show(ours[path])}"
        for key, theirs in zip(models, constants, strict=True)
        for path in sorted(settings)
        if path in theirs and not same(ours[path], theirs[path])
    ]


def facts(config: Config) -> tuple[list[Facts], Facts]:
    """Return the facts of each layer of the model that `config` describes, and those around them.

    Raises:
        LayerFieldError: there is no single list of layers.
    """
    from moeforge.forward import quiet, skeleton

    try:
        with quiet(), _large_without_data():
            model = skeleton(plain_floats(config), attention="eager")
    except Exception as error:  # what a family raises at a config that it cannot build
        reason = str(error).strip().splitlines()[-1].strip()
        raise LayerFieldError(f"transformers cannot build such a model: {reason}") from None
    found = list(_towers(model, "", depth_of(model.config)))
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        what = f"{config.get('model_type')} should have one list of layers, but has {names}"
        raise LayerFieldError(what)
    ((stem, tower),) = found
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    if shared := next((name for name in tied if name.startswith(f"{stem}.")), None):
        what = f"{shared} is shared with {tied[shared]} and stored there alone"
        raise LayerFieldError(f"{what}: the layers of {config.get('model_type')} are not separate")
    around = {name: tuple(p.shape) for name, p in model.named_parameters()}
    known = list(lists(model.config).values())
    return [_layer(layer, known) for layer in tower], {
        name: shape for name, shape in around.items() if not name.startswith(f"{stem}.")
    }


@contextmanager
def _large_without_data() -> Iterator[None]:
    """Make tensors too large to be a table without data, from the start: all experts of a layer."""
    import torch
    from torch.overrides import TorchFunctionMode

    made = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn}

    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if func in made:
                shape = args[0] if args and isinstance(args[0], (list, tuple)) else args
                if math.prod(shape) > _LARGE:
                    kwargs = {**kwargs, "device": "meta"}
            return func(*args, **kwargs)

    with Mode():
        yield


def _towers(module: nn.Module, path: str, depth: int) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield the lists of `depth` modules that lie in no other list, by name."""
    from torch import nn

    for name, child in module.named_children():
        here = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList):
            if len(child) == depth:
                yield here, child
        else:
            yield from _towers(child, here, depth)


def _layer(layer: nn.Module, known: list[list[Any]]) -> Facts:
    """Return the facts of one layer; `known` is what the config says of all, each a list."""
    found: Facts = {}
    for path, module in layer.named_modules():
        stem = f"{path}." if path else ""
        found[f"{stem}class"] = type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            found[f"{stem}{name}"] = tuple(parameter.shape)
        for name, buffer in module.named_buffers(recurse=False):
            found[f"{stem}{name}"] = buffer
        for name, value in vars(module).items():
            if name.startswith("_") or name in _OWN_NUMBER | _DEPTH or not _plain(value):
                continue
            if not isinstance(value, list) or value not in known:
                found[f"{stem}{name}"] = value
    return found


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(each) for each in value)
    return value is None or isinstance(value, (bool, int, float, str))


def same(one: Any, other: Any) -> bool:
    """Say whether two facts are equal; tensors without data are where their shapes are."""
    import torch

    if _same_shape(one, other):
        return one.is_meta or torch.equal(one, other)
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return False
    return bool(one == other)


def _same_shape(one: Any, other: Any) -> bool:
    import torch

    both = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    return both and one.shape == other.shape


def _show(value: Any) -> str:
    if value is _NOTHING:
        return "nothing"
    shape = value if isinstance(value, tuple) else getattr(value, "shape", None)
    return repr(value) if shape is None else str(list(shape))


def _constant(layers: Sequence[Facts]) -> Facts:
    """Return the facts that all of `layers` share."""
    first, *rest = layers
    return {
        path: value
        for path, value in first.items()
        if all(path in layer and same(layer[path], value) for layer in rest)
    }


def _same_around(mine: Facts, made: Facts) -> None:
    """Refuse models whose embeddings or heads have a size that follows from the depth."""
    for name in sorted(mine.keys() | made.keys()):
        if mine.get(name) != made.get(name):
            what = f"{name} would be {_show(made.get(name))}, and is {_show(mine.get(name))}"
            raise LayerFieldError(f"{what}: it grows with the number of layers")

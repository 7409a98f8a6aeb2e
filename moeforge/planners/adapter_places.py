"""Owns finding an adapter's places in a model: names, tied heads, orientation; changes nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping

from moeforge.configs import Config
from moeforge.planners.model import Model, is_input

Shape = tuple[int, ...]
_LAYER = re.compile(r"(?P<stem>(?:[^.]+\.)*?)\d+\.")
_HEAD = re.compile(r"(.+\.)?(lm_head|embed_out)\.(weight|bias)")


def layer_stem(name: str) -> str | None:
    """Return what stands before the layer's number in `name`; None where it is in no layer."""
    match = _LAYER.match(name)
    return match["stem"] if match else None


def is_head(name: str) -> bool:
    """Say whether `name` is the weight or bias of an output head."""
    return bool(_HEAD.fullmatch(name))


def text_config(config: Config) -> Config:
    """Return the part of `config` that speaks of the vocabulary."""
    inner = config.get("text_config")
    return inner if "vocab_size" not in config and isinstance(inner, dict) else config


def find_rename(shapes: Mapping[str, Shape], model: Model) -> tuple[str, str]:
    """Return a prefix to drop and one to put there, so that all tensors in layers are in `model`.

    An adapter may have been trained with the model inside another, or without one around it:
    `model.layers.` may be `language_model.model.layers.` here. The least change that fits counts;
    nothing is changed where none fits, or more than one does.

    Args:
        shapes: shape of each tensor that the adapter changes, in its spelling.
        model: what it is applied to.
    """
    layered = {
        name: sorted(shape) for name, shape in shapes.items() if layer_stem(name) is not None
    }
    if all(name in model.tensors for name in layered):
        return "", ""
    first = min(layered)
    stem = layer_stem(first) or ""
    for drop in ("", *(stem[: dot.end()] for dot in re.finditer(r"\.", stem))):
        rest = first.removeprefix(drop)
        adds = [n.removesuffix(rest) for n in model.tensors if f".{n}".endswith(f".{rest}")]
        fitting = []
        for add in adds:
            there = [add + n.removeprefix(drop) for n in layered if n.startswith(drop)]
            if len(there) == len(layered) and all(name in model.tensors for name in there):
                fitting.append((add, [sorted(model.tensors[n].spec.shape) for n in there]))
        if len(fitting) > 1:  # a vision tower may have layers of the same names
            fitting = [fit for fit in fitting if fit[1] == list(layered.values())]
        if fitting:
            return (drop, fitting[0][0]) if len(fitting) == 1 else ("", "")
    return "", ""


def token_embedding(model: Model) -> str | None:
    """Return the name of the token embedding: the only input with a row for each token."""
    rows = text_config(model.config).get("vocab_size")
    inputs = [name for name in model.tensors if is_input(name) and not is_head(name)]
    shapes = {name: model.tensors[name].spec.shape for name in inputs}
    found = [name for name, shape in shapes.items() if len(shape) == 2 and shape[0] == rows]
    return found[0] if len(found) == 1 else None


def stores_transposed(model: Model) -> bool:
    """Say whether the layers' matrices are stored as [in, out]: GPT-2's Conv1D.

    Its biases, as long as the rows and not as the columns, tell.
    """
    for name, tensor in model.tensors.items():
        bias = model.tensors.get(f"{name.removesuffix('weight')}bias")
        shape = tensor.spec.shape
        layered = layer_stem(name) is not None
        if bias and layered and len(shape) == 2 and shape[0] != shape[1]:
            return bias.spec.shape == shape[1:]
    return False


def tied_embedding(model: Model) -> str | None:
    """Return the name of the token embedding where the model also uses it as its head."""
    makers = model.config.get("architectures") or []
    says = model.config.get("tie_word_embeddings")
    heads = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    has_head = any(str(maker).endswith(heads) for maker in makers) if makers else says is True
    if says is False or not has_head or any(is_head(name) for name in model.tensors):
        return None
    return token_embedding(model)

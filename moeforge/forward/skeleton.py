"""Owns transformers' models for a config: without weights, or whole in memory.

Knows transformers' classes; knows nothing of layers, prompts or where weights come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moeforge.configs import Config, plain_floats
from moeforge.module_weights import ReadTensor

if TYPE_CHECKING:
    from torch import nn


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
    with quiet(), init_empty_weights(include_buffers=False), _nothing_drawn():
        model: nn.Module = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING[kind].from_dict(plain_floats(config)),
            attn_implementation=attention,
            dtype=torch.float32,
        )
    return model.eval()


_DRAWS = {"uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_"}
"""By name: transformers puts functions of its own in the place of torch's."""


@contextmanager
def _nothing_drawn() -> Iterator[None]:
    """Leave out random numbers for weights without data: most of the time that a skeleton takes."""
    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if getattr(func, "__name__", "") in _DRAWS:
                tensor = args[0] if args else kwargs["tensor"]
                if tensor.is_meta:
                    return tensor
            return func(*args, **kwargs)

    with Mode():
        yield


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

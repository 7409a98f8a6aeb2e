"""Owns leaving out the layers that predict tokens after the next one, numbered after the last.

DeepSeek-V3, GLM-4.5 and others store them as layers; transformers does not load them, and what
they follow is not the same model once layers move.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moeforge.configs import Config, n_layers
from moeforge.planners.model import Model, reads, towers

WHY = "predicts tokens after the next one, for another model"
KEY = "num_nextn_predict_layers"


def without_prediction(model: Model) -> Model:
    """Return `model` without such layers, their tensors left out; `model` itself if it has none."""
    depth, more = n_layers(model.config), model.config.get(KEY)
    if not isinstance(more, int) or more < 1 or not depth:
        return model
    stems = [stem for stem, count in towers(model.tensors).items() if count == depth + more]
    if len(stems) != 1:
        return model
    beyond = tuple(f"{stems[0]}{depth + i}." for i in range(more))
    gone = [tensor for name, tensor in model.tensors.items() if name.startswith(beyond)]
    return replace(
        model,
        config={**_cut(model.config, depth, depth + more), KEY: 0},
        tensors={name: t for name, t in model.tensors.items() if not name.startswith(beyond)},
        left_out={
            **model.left_out,
            **{read: WHY for tensor in gone for read in reads(tensor)},
        },
    )


def _cut(config: Config, depth: int, length: int) -> Config:
    """Return `config` with lists of an entry for each of `length` layers cut to `depth`."""

    def cut(value: Any) -> Any:
        return value[:depth] if isinstance(value, list) and len(value) == length else value

    return {key: cut(value) for key, value in config.items()}

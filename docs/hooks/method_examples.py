"""Owns the toy tensors of the pictures of merge methods, merged by the real engine in one run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

Values = tuple[float, ...]
SWEEP = tuple(i / 24 for i in range(25))
"""Shares from one model to another."""


@dataclass(frozen=True)
class Case:
    """One merge of a toy tensor.

    Attributes:
        method: entry of the shelf.
        inputs: the tensors, the base first where there is one.
        params: what differs from the defaults; one value for each input where the method has so.
        based: whether the first input is used as a base.
    """

    method: str
    inputs: tuple[Values, ...]
    params: Mapping[str, Any] = field(default_factory=dict)
    based: bool = True


def merged(cases: Sequence[Case]) -> list[Values]:
    """Return the result of each case, in float64, from one run of the engine."""
    import numpy as np
    from safetensors.numpy import load_file

    from moeforge import engine
    from moeforge.engine import Settings
    from moeforge.output.layout import lay_out
    from moeforge.plans import Merge, Plan, PlannedTensor, Read
    from moeforge.sources.memory import MemorySource
    from moeforge.tensors import BY_NAME, TensorSpec

    sources: dict[str, MemorySource] = {}
    planned = []
    for number, case in enumerate(cases):
        spec = TensorSpec(BY_NAME["float64"], (len(case.inputs[0]),))
        reads = []
        for i, values in enumerate(case.inputs):
            key = f"{number}/{i}"
            sources[key] = MemorySource(key, {"x": (spec, np.array(values).tobytes())})
            reads.append(Read(key, "x"))
        expr = Merge(case.method, tuple(reads), tuple(_params(case).items()))
        planned.append(PlannedTensor(str(number), spec, expr))
    plan = Plan("merge", tuple(planned), {}, sources, sources["0/0"])
    with TemporaryDirectory() as folder:
        engine.run(plan, lay_out(plan.tensors), Path(folder), Settings(threads=1))
        found = load_file(f"{folder}/model.safetensors")
    return [tuple(found[str(number)].tolist()) for number in range(len(cases))]


def _params(case: Case) -> dict[str, Any]:
    """Return all parameters of the method, as a plan has them."""
    from moeforge import methods

    method, count = methods.load(case.method), len(case.inputs)
    params: dict[str, Any] = {"key": 5} if method.random else {}
    for name, param in method.params.items():
        value = case.params.get(name, param.default)
        if param.scope == "shared":
            params[name] = value
            continue
        values = tuple(value) if isinstance(value, tuple) else (value,) * count
        base = case.based and param.scope == "non_base"
        params[name] = (None, *values[1:]) if base else values
    return params


def polar(length: float, degrees: float) -> Values:
    """Return a vector in the plane."""
    angle = math.radians(degrees)
    return length * math.cos(angle), length * math.sin(angle)


def differences(models: int, elements: int, share: float = 1.0) -> tuple[Values, ...]:
    """Return what models add to a base: noise, zero in all but a `share` of the elements."""
    import random

    draw = random.Random(7)
    return tuple(
        tuple(draw.gauss(0, 1) * (draw.random() < share) for _ in range(elements))
        for _ in range(models)
    )

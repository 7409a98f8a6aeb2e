"""The shelf of merge methods: one file per method, named as recipes name it.

A method is arithmetic only. Dtypes, slices, devices, shapes, progress and errors belong to the
engine; which value a parameter has for a tensor belongs to the planners.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from moeforge import catalog

if TYPE_CHECKING:
    from torch import Tensor

Params = Mapping[str, Any]
Stats = tuple[float, ...]


@dataclass(frozen=True)
class Param:
    """A parameter of a method.

    Attributes:
        kind: bool, int, float or str.
        default: value where the recipe sets none; REQUIRED if it must.
        scope: "shared": one value per output tensor, filters see the output's name.
            "input": one per input, filters see that model's own tensor name.
    """

    kind: type
    default: Any
    scope: Literal["shared", "input"] = "shared"


REQUIRED: Any = object()
"""Default of a parameter that the recipe must set."""


@dataclass(frozen=True)
class Method:
    """A merge method.

    Attributes:
        title: name for people.
        paper: where the formula comes from; may be empty.
        merge: (tensors, params, stats) -> Tensor. The tensors are equal slices of the flattened
            inputs in float32 (float64 for float64 inputs), in the order of the recipe but for a
            base that is used as one, which is first. They are scratch: they may be overwritten,
            and the result may be one of them. Pure otherwise, and the same wherever the slice lies.
        params: parameters by name.
        inputs: fewest and most inputs, base included; None for no limit.
        base: "required", or "none" where a base is an ordinary input.
        measure: (tensors, params) -> sums over a block of elements that are added up over the
            whole tensor, exactly, and given to `merge` as `stats`; None where none are needed.
        check: (params) -> what is wrong with these values together, or an empty string.
    """

    title: str
    merge: Callable[[Sequence[Tensor], Params, Stats], Tensor]
    params: Mapping[str, Param]
    inputs: tuple[int, int | None]
    base: Literal["required", "none"] = "none"
    measure: Callable[[Sequence[Tensor], Params], Stats] | None = None
    check: Callable[[Params], str] | None = None
    paper: str = ""


def load(name: str) -> Method:
    """Return the method in file `name`."""
    method: Method = catalog.load("methods", name, "METHOD")
    return method

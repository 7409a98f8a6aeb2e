"""The shelf of merge methods: one file per method, named as recipes name it.

A method is arithmetic only. Dtypes, slices, devices, shapes, progress and errors belong to the
engine; which value a parameter has for a tensor belongs to the planners.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from moeforge import catalog

if TYPE_CHECKING:
    from torch import Tensor

Params = Mapping[str, Any]

BLOCK = 2**16
"""Elements per block. Sums are taken block by block, so that they do not depend on how the work is
divided; rows that may not be divided come together in blocks of about this size."""
RUN = 2**8
"""Elements per run of a sample. Rows differ: with half as many runs brackets miss."""
CHUNK = 2**22
"""Elements per chunk, about: what a worker takes at a time."""
PADDING = 112
"""Elements between rows whose lengths are powers of two, or near them."""
HELD = 2**28
"""Bits of one tensor's random choices that a worker holds from measuring to merging, at most."""


@dataclass(frozen=True)
class Param:
    """A parameter of a method.

    Attributes:
        kind: bool, int, float or str.
        default: value where the recipe sets none; REQUIRED if it must.
        scope: "shared": one value per output tensor, filters see the output's name.
            "input": one per input, filters see that model's own tensor name.
            "non_base": the same, but not for the base, whose value is None.
        unused: accepted because mergekit knows it, and without effect.
    """

    kind: type
    default: Any
    scope: Literal["shared", "input", "non_base"] = "shared"
    unused: bool = False


REQUIRED: Any = object()
"""Default of a parameter that the recipe must set."""


@dataclass(frozen=True)
class Place:
    """Where the elements that a method is handed lie.

    Attributes:
        shape: shape of the whole tensor.
        start: index of the first element in the flattened tensor.
        out: where the result goes, rounded to its dtype; a method may put it there itself, and
            return it, instead of returning it in the dtype of its inputs.
    """

    shape: tuple[int, ...]
    start: int
    out: Tensor | None = field(default=None, compare=False)

    @property
    def row(self) -> int:
        """Elements along the last dimension; a vector is one row."""
        return max(self.shape[-1], 1) if self.shape else 1

    @property
    def group(self) -> int:
        """Elements of as many rows as make about a block; one, if it is longer."""
        return self.row * max(1, BLOCK // self.row)

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return prod(self.shape)


Look = Callable[["Tensor", Place], Any]


@dataclass(frozen=True)
class Scan:
    """One pass over the inputs, asked for by a measurement.

    Attributes:
        look: (tensors, place) -> something. Called for slices that begin at multiples of BLOCK from
            the start of the chunk or run; for methods that need whole rows, always for the same
            groups of rows, several if it is `grouped`. The tensors are scratch as in `merge`.
        join: turns what `look` gave for the pieces of one chunk, in order, into one thing. What a
            chunk is does not depend on how the work is divided.
        runs: element ranges (start, count) to look at; None for the whole tensor. Each run is a
            chunk.
        sample: look at an evenly spread sample instead: runs of RUN elements (of whole rows for
            methods that need them), some or all of them in one chunk, at a place without meaning.
    """

    look: Look
    join: Callable[[list[Any]], Any]
    runs: tuple[tuple[int, int], ...] | None = None
    sample: bool = False


Measurement = Generator[Scan, list[Any], Any]
"""Yields scans, receives what `join` gave for each of their chunks, in order, and returns `stats`.
It may raise ValueError where the tensors have no merge."""


@dataclass(frozen=True)
class Method:
    """A merge method.

    Attributes:
        title: name for people.
        merge: (tensors, params, stats, place) -> Tensor. The rows of `tensors` [inputs, elements]
            are equal slices of the flattened inputs in float32 (float64 for float64 inputs), in the
            order of the recipe but for a base that is used as one, which is first. They are
            scratch: they may be overwritten, and the result may be one of them, or `place.out`.
            Pure otherwise.
        params: parameters by name.
        inputs: fewest and most inputs, a required base included, an optional one not; None for no
            limit. A required base alone is the result: no method is asked.
        base: "required"; "optional": used as one where there is one (then its value of a
            "non_base" parameter is None); "none": a base is an ordinary input.
        measure: (params, place) -> what must be known of the whole tensor first; None for nothing.
        rows: (params) -> whether slices must be made of whole rows, along the last dimension.
        grouped: whether it may be handed several groups of rows at a time where it is handed them
            as they are stored, see `kernels`.
        kernels: files of `kernels` that it uses; where there are some and they are loaded, it may
            be handed rows in bfloat16 as they are stored, and widens them itself.
        multiplies: whether it has BLAS multiply, which not every process may, see `workers`.
        random: whether `params` gets a "key", which random draws follow from.
        check: (params) -> what is wrong with these values together, or an empty string.
        paper: where the formula comes from; may be empty.
    """

    title: str
    merge: Callable[[Tensor, Params, Any, Place], Tensor]
    params: Mapping[str, Param]
    inputs: tuple[int, int | None]
    base: Literal["required", "optional", "none"] = "none"
    measure: Callable[[Params, Place], Measurement] | None = None
    rows: Callable[[Params], bool] = lambda params: False
    grouped: bool = False
    kernels: tuple[str, ...] = ()
    multiplies: bool = False
    random: bool = False
    check: Callable[[Params], str] | None = None
    paper: str = ""


def load(name: str) -> Method:
    """Return the method in file `name`."""
    method: Method = catalog.load("methods", name, "METHOD")
    return method

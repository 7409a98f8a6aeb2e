"""Owns saying what went wrong while a tensor was made: which, out of what, from which files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from moeforge.errors import BuildError, Finding, MoeforgeError, out_of_memory
from moeforge.finite import Odd, count_odd
from moeforge.plans import Expr, Fill, Merge, Plan, Read, inputs, walk
from moeforge.sources import lies
from moeforge.tensors import DType

_WINDOW = 2**20
_SHOWN = 4
"""Inputs of an expression that a message names."""


def explain(error: BaseException, job: Any) -> MoeforgeError:
    """Return what to raise for an error that came up while `job` was done, None before any."""
    if isinstance(error, MoeforgeError):
        return error
    kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
    if out_of_memory(error):
        where = f"{job.name}: " if job else ""
        fix = "Use fewer --threads, give --memory what is free, or end other programs."
        explained = BuildError(Finding(f"{where}there is not enough memory", fix))
    elif job is None:
        explained = BuildError(Finding(f"{kind}{error}", "Nothing was published."))
    else:
        what = f"{job.name}: {kind}{error}; it is {job.describe()}"
        explained = BuildError(Finding(what, "Nothing was published."))
    explained.__cause__ = error
    return explained


def short(plan: Plan, expr: Expr) -> str:
    """Return `expr` in a line: methods, tensors, their shapes and files."""
    if isinstance(expr, Read):
        source = plan.sources[expr.source]
        spec, span = source.specs()[expr.name], lies(source, expr.name)
        return f"{expr.name} {spec} of {span.path if span else source.key}"
    if isinstance(expr, Fill):
        return f"all {expr.value}"
    below = [short(plan, child) for child in inputs(expr)]
    if len(below) > _SHOWN:
        below = [*below[: _SHOWN - 1], f"{len(below)} in all"]
    word = expr.method if isinstance(expr, Merge) else type(expr).__name__.lower()
    return f"{word} of ({', '.join(below)})"


class OddValues:
    """Counts the values of one output tensor that are not finite, as their bytes pass through."""

    def __init__(self, dtype: DType) -> None:
        self._dtype = dtype
        self._found: list[Odd] = []  # appended to by several threads

    def look(self, data: memoryview) -> None:
        """Look at whole elements."""
        odd = count_odd(data, self._dtype)
        if any(odd):
            self._found.append(odd)

    @property
    def total(self) -> Odd:
        """What was found in all."""
        return Odd(sum(odd.nan for odd in self._found), sum(odd.infinite for odd in self._found))

    def refuse(self, name: str, whence: Callable[[], str]) -> None:
        """Refuse the tensor if anything was found.

        Args:
            name: the tensor.
            whence: says where the values come from.

        Raises:
            BuildError: with their number.
        """
        odd = self.total
        if any(odd):
            raise BuildError(
                Finding(
                    f"{name} would have {said(odd)}: {whence()}",
                    "A model with such values answers with NaN. Use a whole copy of the input, or "
                    "a dtype that holds larger numbers, such as bfloat16. Nothing was published.",
                )
            )


def said(odd: Odd) -> str:
    """Return the counts in words."""
    parts = [f"{odd.nan} NaN"] if odd.nan else []
    parts += [f"{odd.infinite} infinite"] if odd.infinite else []
    return " and ".join(parts) + f" value{'s' if sum(odd) > 1 else ''}"


def whence(plan: Plan, expr: Expr, dtype: DType) -> str:
    """Say where values of `expr` that are not finite come from; reads its inputs once more."""
    found = list(_odd_inputs(plan, expr))
    if found:
        return "; ".join(found)
    return f"all its inputs are finite, so it does not fit into {dtype}; it is {short(plan, expr)}"


def _odd_inputs(plan: Plan, expr: Expr) -> Iterator[str]:
    for read in dict.fromkeys(part for part in walk(expr) if isinstance(part, Read)):
        source = plan.sources[read.source]
        spec, counter = source.specs()[read.name], OddValues(source.specs()[read.name].dtype)
        for start in range(0, spec.nbytes, _WINDOW):
            data = memoryview(bytearray(min(_WINDOW, spec.nbytes - start)))
            source.read(read.name, start, data)
            counter.look(data)
        if any(counter.total):
            span = source.locate(read.name)
            where = span.path if span else source.key
            yield f"{read.name} of {where} has {said(counter.total)}"

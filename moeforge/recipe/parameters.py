"""Owns parameter values: scalars, gradients and `{filter, value}` lists, and who wins.

The rules are mergekit's, so that its recipes mean the same: the most specific scope that sets a
value for this tensor wins; a scope whose filters all miss sets nothing and falls through.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationError
from pydantic_core import InitErrorDetails

from moeforge.errors import Path, closest, nearest
from moeforge.recipe.strict import show, wrong

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Condition:
    """A value for the tensors whose name contains `filter` (None or "*": all tensors).

    `value` is a scalar, or a tuple of scalars: a gradient over the layers of a slice.
    """

    value: Scalar | tuple[Scalar, ...]
    filter: str | None = None

    def matches(self, name: str) -> bool:
        """Say whether tensor `name` is meant: by plain substring, as in mergekit."""
        return self.filter is None or self.filter == "*" or self.filter in name


Setting = tuple[Condition, ...]
"""What one parameter is set to in one scope; the first condition that matches counts."""


Problems = list[InitErrorDetails]


def _report(problems: Problems, path: Path, message: str) -> None:
    problems.append({"type": wrong(message), "loc": path, "input": None})


def _value(value: Any, path: Path, problems: Problems) -> Scalar | tuple[Scalar, ...]:
    if isinstance(value, (list, tuple)):
        return tuple(_scalar(each, (*path, i), problems) for i, each in enumerate(value))
    return _scalar(value, path, problems)


def _scalar(value: Any, path: Path, problems: Problems) -> Scalar:
    if isinstance(value, (bool, int, float, str)):
        return value
    _report(problems, path, f"expected a number, got {show(value)}")
    return 0


def _condition(entry: dict[str, Any], path: Path, problems: Problems) -> Condition:
    known = ("filter", "value")
    for key in entry:
        if key not in known:
            hint = nearest(str(key), known) or "; expected filter and value"
            _report(problems, (*path, key), f'unknown key "{key}"{hint}')
    if "value" not in entry and "value" not in {closest(str(key), known) for key in entry}:
        _report(problems, path, '"value" is missing; expected filter and value')
    name_filter = entry.get("filter")
    if name_filter is not None and not isinstance(name_filter, str):
        said = f"a filter is a text, got {show(name_filter)}; put it in quotes"
        _report(problems, (*path, "filter"), said)
    value = _value(entry["value"], (*path, "value"), problems) if "value" in entry else 0
    return Condition(value, name_filter)


def _setting(value: Any) -> Setting:
    if isinstance(value, tuple) and all(isinstance(item, Condition) for item in value):
        return value
    problems: Problems = []
    setting: Setting
    if isinstance(value, dict):
        setting = (_condition(value, (), problems),)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        if not all(isinstance(item, dict) for item in value):
            raise wrong("a list mixes numbers and filter/value entries")
        setting = tuple(_condition(item, (i,), problems) for i, item in enumerate(value))
    elif isinstance(value, list) and not value:
        setting = ()
    else:
        setting = (Condition(_value(value, (), problems)),)
    if problems:
        raise ValidationError.from_exception_data("parameters", problems)
    return setting


Parameters = dict[str, Annotated[Any, BeforeValidator(_setting)]]
"""Settings by parameter name."""


_TRUTH = {
    **dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "off", "0"), False),
}
"""Words for yes and no; YAML itself knows some of them, unless they are in quotes."""


class ParameterError(ValueError):
    """A value does not have the type that the method declares."""


def coerce(value: Scalar, kind: type) -> Scalar:
    """Return `value` as `kind` (bool, int, float or str).

    Raises:
        ParameterError: it is not one: `normalize: 2`, `t: high`.
    """
    if kind is bool and isinstance(value, bool):
        return value
    if kind is bool and isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    if kind is bool and isinstance(value, str) and value.lower() in _TRUTH:
        return _TRUTH[value.lower()]
    if kind is str and isinstance(value, str):
        return value
    if kind in (int, float):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number) and (kind is float or number == int(number)):
            return kind(number)
    expected = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    raise ParameterError(f"expected {expected[kind]}, got {value!r}")


def evaluate(
    setting: Setting, name: str, position: float, kind: type
) -> tuple[Scalar, Condition] | None:
    """Return what `setting` says for tensor `name`, with the condition that said it.

    Args:
        setting: conditions, first match first.
        name: tensor name that filters look at.
        position: place in the slice, 0 for its first layer, 1 for its last.
        kind: declared type; numbers are interpolated, other types picked.

    Returns:
        None where no condition matches, or the first that does has an empty list: the next scope
        is asked.

    Raises:
        ParameterError: a value has the wrong type.
    """
    for condition in setting:
        if not condition.matches(name):
            continue
        if condition.value == ():
            return None
        if not isinstance(condition.value, tuple):
            return coerce(condition.value, kind), condition
        values = [coerce(value, kind) for value in condition.value]
        place = position * (len(values) - 1)
        low = int(place)
        if kind not in (int, float):
            return values[low], condition
        high = min(low + 1, len(values) - 1)
        share = place - low
        mixed = (1 - share) * float(values[low]) + share * float(values[high])
        return coerce(mixed, kind), condition
    return None


@dataclass(frozen=True)
class Scope:
    """The `parameters` of one level of the recipe, and where they stand in it."""

    settings: dict[str, Setting]
    path: Path


def resolve(
    parameter: str,
    scopes: Iterable[Scope],
    name: str,
    position: float,
    kind: type,
    used: set[Path],
) -> Scalar | None:
    """Return the value of `parameter` for tensor `name` from the first scope that sets it.

    Args:
        parameter: its name.
        scopes: most specific first.
        name: tensor name that filters look at.
        position: place in the slice, from 0 to 1.
        kind: declared type.
        used: receives the path of every condition that decided a value, so that filters which
            match nothing can be reported.

    Raises:
        ParameterError: with the path of the setting in front.
    """
    for scope in scopes:
        setting = scope.settings.get(parameter)
        if setting is None:
            continue
        try:
            found = evaluate(setting, name, position, kind)
        except ParameterError as error:
            error.path = (*scope.path, parameter)  # type: ignore[attr-defined]
            raise
        if found is not None:
            value, condition = found
            used.add((*scope.path, parameter, setting.index(condition)))
            return value
    return None


def unused_filters(scopes: Sequence[Scope], used: set[Path]) -> list[tuple[Path, str]]:
    """Return path and filter of every `{filter, value}` entry that decided no value."""
    missed = []
    for scope in scopes:
        for parameter, setting in scope.settings.items():
            for index, condition in enumerate(setting):
                path = (*scope.path, parameter, index)
                decides = condition.value != () and condition.filter not in (None, "*")
                if decides and path not in used:
                    missed.append((path, str(condition.filter)))
    return missed

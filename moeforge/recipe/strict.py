"""Owns strictness: mappings whose unknown keys are errors, and mistakes in plain words.

Knows pydantic; knows no key of any recipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from moeforge.errors import closest, nearest


def wrong(message: str) -> PydanticCustomError:
    """Return the error that a validator raises to say `message`."""
    # Braces would be read as placeholders by pydantic's message templates.
    return PydanticCustomError("recipe", "{message}", {"message": message})


@dataclass(frozen=True, eq=False)
class Written:
    """What a value looks like in a recipe, where its Python type does not say it.

    It stands in annotations beside the validator that takes such values.

    Attributes:
        schema: JSON Schema; `{"$ref": "#/definitions/…"}` for a definition of
            `moeforge.recipe.json_schema`.
    """

    schema: dict[str, Any]


def or_none(value: Any) -> Any:
    """Take an empty text for a key that is not there, as mergekit does."""
    return None if value == "" else value


def or_empty(value: Any) -> Any:
    """Take an empty `parameters:` for no entries, as YAML writes it."""
    return {} if value is None else value


class Strict(BaseModel):
    """A mapping whose unknown keys are errors that name the nearest known key."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @model_validator(mode="wrap")
    @classmethod
    def _report_unknown_keys(cls, data: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        if isinstance(data, cls):
            return data
        if not isinstance(data, dict):
            raise wrong(f"expected a mapping with {_keys(cls)}, got {show(data)}")
        known = tuple(cls.model_fields)
        problems: list[InitErrorDetails] = []
        meant = set()
        for key in data:
            if key in known:
                continue
            hint = nearest(key, known) or f". Known here: {', '.join(known)}."
            message = f'unknown key "{key}"{hint}'
            meant.add(closest(key, known))
            problems.append({"type": wrong(message), "loc": (key,), "input": None})
        result = None
        try:
            result = handler({key: value for key, value in data.items() if key in known})
        except ValidationError as error:
            problems.extend(_details(error, meant))
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, problems)
        return result


def _keys(cls: type[BaseModel]) -> str:
    required = [name for name, field in cls.model_fields.items() if field.is_required()]
    return ", ".join(required or list(cls.model_fields)[:3])


def show(value: Any) -> str:
    """Return `value` for a message: short, and None as people say it."""
    text = "nothing" if value is None else repr(value)
    if isinstance(value, date):  # YAML makes one of 2024-01-01
        text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


_EXPECTED = {
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "string_type": "a text",
    "string_too_short": "a text that is not empty",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a number",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "too_short": "at least one entry",
}
"""What pydantic's kinds of errors say in the words of this project."""


def _details(error: ValidationError, meant: set[str | None]) -> list[InitErrorDetails]:
    """Turn pydantic's errors into details in the words of this project.

    Args:
        error: what pydantic raised.
        meant: keys that are only misspelt, so that it would mislead to call them missing.
    """
    details: list[InitErrorDetails] = []
    for item in error.errors(include_url=False):
        kind, value, message = item["type"], item["input"], item["msg"]
        if kind == "too_short" and value:
            continue  # its items were dropped because they are wrong, and are reported themselves
        if kind == "missing":
            if item["loc"][0] in meant:
                continue
            message = "required, but missing"
        elif kind != "recipe":
            expected = _EXPECTED.get(kind, message).format(**item.get("ctx", {}))
            message = f"expected {expected}, got {show(value)}"
            if kind == "string_type" and not isinstance(value, (dict, list, type(None))):
                message += "; put it in quotes"
        details.append({"type": wrong(message), "loc": item["loc"], "input": None})
    return details

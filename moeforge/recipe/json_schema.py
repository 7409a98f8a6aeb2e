"""Owns the JSON Schema of recipes, for editors; made of the same classes that validate them.

Draft 7, which is what editors read. It accepts the usual spellings of whatever is a recipe; what
depends on several values, or on the models, it does not know.
"""

from __future__ import annotations

import re
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from moeforge import catalog, tensors
from moeforge.recipe.kinds import KINDS
from moeforge.recipe.mixture import REMOTE, Every, LayerSource, MoeRecipe
from moeforge.recipe.schema import Adapter, Reference, or_no_entries
from moeforge.recipe.strict import Strict, Written, or_empty
from moeforge.recipe.vocabulary import ModelToken, Zero

Schema = dict[str, Any]

_NUMBER = r"^\s*[-+]?(\d+(_\d+)*\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$"
"""A number in quotes, or 1e-5, which YAML 1.1 reads as a text."""
_TRUTH = (
    "^([Tt](rue|RUE)?|[Ff](alse|ALSE)?|[Yy](es|ES)?|[Nn][oO]?|[Oo](n|N|ff|FF)|[01])$"  # as coerce
)
_TYPES = {str: {"type": "string"}, bool: {"type": "boolean"}, int: {"type": "integer"}}
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum"}
_SHORTEST = {"string": "minLength", "array": "minItems", "object": "minProperties"}


def json_schema() -> Schema:
    """Return the JSON Schema of a recipe of any kind."""
    writer = _Writer()
    kinds = {key: writer.reference(kind) for key, kind in KINDS.items()}
    inline = {key: kind for key, kind in kinds.items() if KINDS[key] is not MoeRecipe}
    for owned in (LayerSource, Every, Zero, ModelToken):
        writer.reference(owned)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "moeforge recipe",
        "description": "One model: a mixture of experts, a stack of layers, or a merge.",
        **_by_key(kinds, {"oneOf": [*kinds.values()]}),
        "definitions": {
            **_places(writer, inline),
            **_words(),
            **_parameters(),
            **dict(sorted(writer.definitions.items())),
        },
    }


def _by_key(kinds: dict[str, Schema], otherwise: Schema) -> Schema:
    """Return a schema that follows from which of the keys of `kinds` are there.

    So editors speak about the kind that is meant: of mere alternatives they choose the one with the
    fewest mistakes.
    """
    filled = {
        key: {
            "properties": {key: {"type": ["array", "object"], "minItems": 1, "minProperties": 1}},
            "required": [key],
        }
        for key in kinds
    }
    ways = [{"if": filled[key], "then": kind} for key, kind in kinds.items()]
    none = {"if": {"anyOf": [*filled.values()]}, "else": otherwise}
    return {"type": "object", "allOf": [*ways, none]}


def descriptions(cls: type[Strict]) -> dict[str, str]:
    """Return what the docstrings of `cls` and its bases say of each field."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, attributes = (base.__doc__ or "").partition("Attributes:\n")
        for entry in re.split(r"\n {8}(?=\w+: )", "\n" + attributes.rstrip())[1:]:
            name, _, text = entry.partition(": ")
            found[name] = " ".join(text.split())
    return found


class _Writer:
    """Turns the classes of the recipe language into definitions."""

    def __init__(self) -> None:
        self.definitions: dict[str, Schema] = {}

    def reference(self, cls: type[Strict]) -> Schema:
        """Return a reference to the definition of `cls`, which is made unless it is there."""
        if cls.__name__ not in self.definitions:
            self.definitions[cls.__name__] = {}  # so that what nests in itself ends
            self.definitions[cls.__name__] = self.mapping(cls)
        return {"$ref": f"#/definitions/{cls.__name__}"}

    def mapping(self, cls: type[Strict]) -> Schema:
        """Return what a mapping with the fields of `cls` looks like."""
        described = descriptions(cls)
        fields = cls.model_fields
        schema: Schema = {
            "type": "object",
            "description": (cls.__doc__ or "").partition("\n")[0],
            "properties": {
                name: self.field(fields[name], described.get(name, ""))
                for name in sorted(fields, key=lambda name: name not in cls.__annotations__)
            },
            "required": [name for name, field in fields.items() if field.is_required()],
            "additionalProperties": False,
        }
        others = [key for key, kind in KINDS.items() if cls in KINDS.values() and kind is not cls]
        if others:  # mergekit takes an empty list for a key that is not there
            empty = {"type": ["array", "object", "null"], "maxItems": 0, "maxProperties": 0}
            schema["patternProperties"] = {f"^({'|'.join(others)})$": empty}
        return schema

    def field(self, field: FieldInfo, description: str) -> Schema:
        """Return what the value of `field` looks like."""
        schema = {"description": description, **self.value(field.annotation, field.metadata)}
        if "$ref" in schema:  # whose neighbours draft 7 ignores
            schema = {"description": description, "allOf": [{"$ref": schema["$ref"]}]}
        if isinstance(field.default, (bool, int, float, str)):
            schema["default"] = field.default
        return schema

    def value(self, kind: Any, notes: Any = ()) -> Schema:
        """Return what a value of type `kind`, annotated with `notes`, looks like."""
        flat = [part for note in notes for part in (note, *getattr(note, "metadata", ()))]
        written = [note.schema for note in flat if isinstance(note, Written)]
        schema = dict(written[-1]) if written else self.typed(kind)
        for note in flat:
            for bound, word in _BOUNDS.items():
                if hasattr(note, bound):
                    schema[word] = getattr(note, bound)
            if hasattr(note, "min_length"):
                schema[_SHORTEST[schema["type"]]] = note.min_length
        empties = (or_empty, or_no_entries)
        if any(isinstance(note, BeforeValidator) and note.func in empties for note in flat):
            return {"anyOf": [schema, {"type": "null"}]}
        return schema

    def typed(self, kind: Any) -> Schema:
        """Return what a value of type `kind` looks like."""
        origin, arguments = get_origin(kind), get_args(kind)
        if origin is Annotated:
            return self.value(arguments[0], arguments[1:])
        if origin in (Union, types.UnionType):
            return {"anyOf": [self.typed(argument) for argument in arguments]}
        if origin is Literal:
            return {"enum": [*arguments]}
        if origin is tuple:
            return {"type": "array", "items": self.typed(arguments[0])}
        if origin is dict:
            return {"type": "object", "additionalProperties": self.typed(arguments[1])}
        if kind is type(None):
            return {"type": "null"}
        if kind is float:
            return {"type": ["number", "string"], "pattern": _NUMBER}
        if isinstance(kind, type) and issubclass(kind, Strict):
            return self.reference(kind)
        return dict(_TYPES[kind])


# --- definitions by hand -------------------------------------------------------------------------


def _places(writer: _Writer, inline: dict[str, Schema]) -> dict[str, Schema]:
    """Return where models may stand."""
    text = {"type": "string", "minLength": 1}
    adapter = writer.mapping(Adapter)
    adapter["properties"]["path"] = {"description": "mergekit's word for model.", **text}
    del adapter["required"]
    adapter["oneOf"] = [{"required": ["model"]}, {"required": ["path"]}]
    mergekits = {
        "type": "object",
        "properties": {"path": text, "revision": {"type": ["string", "null"]}},
        "required": ["path"],
        "additionalProperties": False,
    }
    return {
        "model": {
            "description": "A folder, beside the recipe or from here; a Hub id, with @revision; "
            "either with a LoRA adapter, model+adapter; or a merge or stack of its own.",
            "anyOf": [text, _by_key(inline, {"$ref": "#/definitions/reference"})],
        },
        "reference": writer.mapping(Reference),
        "place": {"anyOf": [text, _by_key(inline, mergekits)]},
        "adapter": {"anyOf": [text, adapter, {"type": "null"}]},
    }


def _words() -> dict[str, Schema]:
    """Return the words from the shelves."""
    methods = {name: catalog.load("methods", name, "METHOD") for name in catalog.names("methods")}
    gates = {name: catalog.load("gates", name, "GATE") for name in catalog.names("gates")}
    families = ("auto", *catalog.names("families"), REMOTE)
    dtypes = tensors.OUTPUT_NAMES
    starts = "|".join(map(_start_of, families))
    return {
        "method": {
            "enum": [*methods],
            "enumDescriptions": [method.title for method in methods.values()],
        },
        "gate_mode": {
            "enum": [*gates],
            "enumDescriptions": [gate.title for gate in gates.values()],
        },
        "architecture": {
            "anyOf": [{"enum": [*families]}, {"type": "string", "pattern": f"^({starts})$"}]
        },
        "dtype": {
            "anyOf": [
                {"enum": [*dtypes]},
                {"type": "string", "pattern": rf"^(torch\.({'|'.join(dtypes)}))?$"},
                {"type": "null"},
            ]
        },
    }


def _start_of(word: str) -> str:
    """Return a pattern for `word` and every start of it, in letters of either case."""
    letters = [f"[{c}{c.upper()}]" if c.isalpha() else re.escape(c) for c in word]
    pattern = letters.pop()
    while letters:
        pattern = f"{letters.pop()}({pattern})?"
    return pattern


def _parameters() -> dict[str, Schema]:
    """Return the parameters of all methods: one that only another method has is no mistake."""
    users: dict[str, list[str]] = {}
    kinds: dict[str, type] = {}
    for word in catalog.names("methods"):
        for name, parameter in catalog.load("methods", word, "METHOD").params.items():
            kinds.setdefault(name, parameter.kind)
            plain = isinstance(parameter.default, (bool, int, float, str))
            value = f" ({parameter.default})".lower() if plain else ""
            users.setdefault(name, []).append(word + value)
    truth: Schema = {
        "anyOf": [
            {"type": "boolean"},
            {"enum": [0, 1]},
            {"type": "string", "pattern": _TRUTH},
        ]
    }
    number: Schema = {"type": ["number", "boolean", "string"], "pattern": _NUMBER}
    return {
        "parameters": {
            "description": "By name, a value; a list of values from the first layer to the last; "
            "or a list of {filter, value}, of which the first whose filter is in the tensor's name "
            "counts.",
            "type": ["object", "null"],
            "properties": {
                name: {
                    "description": f"Of {', '.join(users[name])}; in brackets the default.",
                    "allOf": [{"$ref": f"#/definitions/{_SETTINGS[kinds[name]]}"}],
                }
                for name in sorted(users)
            },
            "additionalProperties": False,
        },
        _SETTINGS[bool]: _setting(truth),
        _SETTINGS[float]: _setting(number),
    }


_SETTINGS = {bool: "truth_setting", int: "number_setting", float: "number_setting"}


def _setting(scalar: Schema) -> Schema:
    """Return the ways to set a parameter whose values are `scalar`."""
    gradient = {"type": "array", "items": scalar}
    condition = {
        "type": "object",
        "properties": {
            "filter": {
                "description": 'A part of the names of tensors; "*" or none for all.',
                "type": ["string", "null"],
            },
            "value": {"description": "The value there.", "anyOf": [scalar, gradient]},
        },
        "required": ["value"],
        "additionalProperties": False,
    }
    return {"anyOf": [scalar, gradient, condition, {"type": "array", "items": condition}]}

"""Owns the reference of recipe keys, made of the JSON Schema that editors get."""

from __future__ import annotations

from typing import Any

SECTIONS = {
    "MoeRecipe": "Mixture of experts",
    "Expert": "`experts`, `shared_experts`",
    "LayerSource": "`source_model` by layers",
    "Every": "`layers` at regular distances",
    "GateParameters": "`gate_parameters`",
    "Tuning": "`tune`",
    "MergeRecipe": "Merge of whole models",
    "MergeInput": "`models`",
    "StackRecipe": "Stack of layer ranges",
    "Slice": "`slices`",
    "SliceSource": "`sources`",
    "ModulesRecipe": "Merge by modules",
    "Module": "`modules`",
    "ExtractRecipe": "Dense model out of a mixture",
    "Extraction": "`extract`",
    "RegroupRecipe": "Mixture with other experts of its own",
    "Regrouping": "`regroup`",
    "Tokenizer": "`tokenizer`",
    "TokenSetting": "`tokens`",
    "Zero": "`source` of a token: zeros",
    "ModelToken": "`source` of a token: another token",
}
"""Which mappings there are, in the order of the page, and what each is called there."""
WORDS = {
    "model": "[model](#where-a-model-may-stand)",
    "parameters": "[parameters](#parameters)",
    "method": "[merge method](methods.md)",
    "gate_mode": "[gate mode](gates.md)",
    "architecture": "[architecture](families.md)",
    "dtype": "dtype",
}
"""What stands for the definitions that are no mappings."""


def keys() -> str:
    """Return a table of keys for each mapping of the recipe language.

    Raises:
        LookupError: the language has a mapping that this page has no place for, or lacks one.
    """
    from moeforge.recipe.json_schema import json_schema

    definitions = json_schema()["definitions"]
    mappings = {name for name in definitions if name[0].isupper()}
    if mappings != set(SECTIONS):
        raise LookupError(f"mappings without a section, or none: {mappings ^ set(SECTIONS)}")
    return "\n\n".join(
        [
            *(_section(definitions[name], title) for name, title in SECTIONS.items()),
            _place(definitions["model"], definitions["reference"]),
            _settings(definitions["parameters"]),
            _dtypes(definitions["dtype"]),
        ]
    )


def _section(mapping: dict[str, Any], title: str) -> str:
    described = mapping["description"]
    return f"## {title}\n\n{described}\n\n{_table(mapping)}"


def _table(mapping: dict[str, Any]) -> str:
    required = mapping.get("required", ())
    rows = [
        f"| `{name}` | {_kind(value)} | {_default(name, value, required)} | {_cell(value)} |"
        for name, value in mapping["properties"].items()
    ]
    return "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows])


def _place(model: dict[str, Any], mapping: dict[str, Any]) -> str:
    text = f"{model['description']} As a mapping:"
    return f"## Where a model may stand\n\n{text}\n\n{_table(mapping)}"


def _settings(parameters: dict[str, Any]) -> str:
    rows = [f"| `{name}` | {_cell(value)} |" for name, value in parameters["properties"].items()]
    table = "\n".join(["| parameter | methods |", "|---|---|", *rows])
    return f"## Parameters\n\n{parameters['description']}\n\n{table}"


def _dtypes(dtype: dict[str, Any]) -> str:
    names = ", ".join(f"`{name}`" for name in dtype["anyOf"][0]["enum"])
    return f"## Dtypes\n\n{names}."


def _kind(value: dict[str, Any]) -> str:
    """Return what values there may be, for people."""
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        if name in SECTIONS:
            return f"[keys](#{anchor(SECTIONS[name])})"
        return WORDS.get(name, name)
    if "allOf" in value:
        return _kind(value["allOf"][0])
    if "anyOf" in value:
        kinds = [_kind(kind) for kind in value["anyOf"]]
        return " or ".join(dict.fromkeys(filter(None, kinds)))
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{word}`" for word in value["enum"])
    kinds = value["type"] if isinstance(value["type"], list) else [value["type"]]
    if "number" in kinds:  # which may also stand in quotes
        kinds = ["number"]
    return " or ".join(_named(kind, value) for kind in kinds if kind != "null")


def _named(kind: str, value: dict[str, Any]) -> str:
    if kind == "array":
        pair = value.get("minItems") == value.get("maxItems") == 2
        return "`[start, end]`" if pair else f"list of {_several(value['items'])}"
    if kind == "object":
        inner = value.get("additionalProperties")
        return f"by name: {_kind(inner)}" if isinstance(inner, dict) else "keys"
    words = {"string": "text", "integer": "whole number", "boolean": "true or false"}
    word = words.get(kind, kind)
    least = value.get("minimum")
    return f"{word}, at least {least}" if least is not None else word


def _several(item: dict[str, Any]) -> str:
    """Return what the items of a list may be."""
    kinds = item.get("anyOf", [item])
    plain = [{key: value for key, value in kind.items() if key != "minimum"} for kind in kinds]
    words = {"text": "texts", "whole number": "whole numbers", "number": "numbers"}
    return " or ".join(words.get(word, word) for word in map(_kind, plain))


def _default(name: str, value: dict[str, Any], required: Any) -> str:
    if name in required:
        return "required"
    if "default" not in value:
        return ""
    default = value["default"]
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _cell(value: dict[str, Any]) -> str:
    return str(value.get("description", "")).replace("|", "\\|")


def anchor(title: str) -> str:
    """Return the anchor of a heading, as the site makes it."""
    from markdown.extensions.toc import slugify

    return str(slugify(title.replace("`", ""), "-"))

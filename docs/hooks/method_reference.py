"""Owns what the shelf of merge methods says of itself: parameters, inputs, paper, overview."""

from __future__ import annotations

from typing import Any

PICTURES = "pictures/methods"
"""Folder of the pictures, from docs/."""
_KINDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}
_SCOPES = {
    "shared": "the merge",
    "input": "each model",
    "non_base": "each model but the base",
}


def overview() -> str:
    """Return a table of all methods."""
    rows = []
    for name, method in _shelf().items():
        rows.append(
            f"| [`{name}`](#{name}) | {method.title} | {_inputs(method)} | {_paper(method)} |"
        )
    return "\n".join(["| in a recipe | | models | source |", "|---|---|---|---|", *rows])


def method(name: str) -> str:
    """Return picture and facts of method `name`.

    Raises:
        PluginError: there is no such method.
    """
    from mkdocs.exceptions import PluginError

    if name not in _shelf():
        raise PluginError(f'there is no merge method "{name}"')
    found = _shelf()[name]
    facts = f"*{found.title}*, of {_inputs(found)}. {_paper(found)}".strip()
    picture = f"![What {name} does to weights]({PICTURES}/{name}.svg)"
    return f"{picture}\n\n{_table(found)}\n\n{facts}"


def _shelf() -> dict[str, Any]:
    from moeforge import catalog

    return {name: catalog.load("methods", name, "METHOD") for name in catalog.names("methods")}


def _inputs(method: Any) -> str:
    few, most = method.inputs
    if method.base == "required":
        exactly = {1: "`base_model` and others", 2: "`base_model` and one other"}
        return exactly.get(few, "`base_model` and two or more")
    models = {1: "one", 2: "two"}[few] + ("" if most else " or more")
    return f"{models}, and `base_model` if wanted" if method.base == "optional" else models


def _paper(method: Any) -> str:
    if not method.paper:
        return ""
    place = method.paper.removeprefix("https://").removeprefix("www.")
    known = place.startswith("arxiv.org/abs/")
    words = f"arXiv {place.rpartition('/')[2]}" if known else place.partition("/")[0]
    return f"[{words}]({method.paper})"


def _table(method: Any) -> str:
    rows = [
        f"| `{name}` | {_KINDS[param.kind]} | {_default(param)} | {_SCOPES[param.scope]} |"
        for name, param in method.params.items()
        if not param.unused
    ]
    if not rows:
        return "No parameters."
    return "\n".join(["| parameter | value | default | one for |", "|---|---|---|---|", *rows])


def _default(param: Any) -> str:
    from moeforge.methods import REQUIRED

    if param.default is REQUIRED:
        return "required"
    if param.default is None:
        return ""
    text = str(param.default).lower() if param.kind is bool else f"{param.default:g}"
    return f"`{text}`"

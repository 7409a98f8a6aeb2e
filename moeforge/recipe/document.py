"""Owns YAML: a text becomes plain data plus the line of every value. Knows nothing of recipes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

from moeforge.errors import Finding, Path, RecipeError, nearest

_MAX_NODES = 1_000_000
"""Values a document may expand to; aliases of aliases would otherwise fill the memory."""


@dataclass(frozen=True)
class Document:
    """A YAML document.

    Attributes:
        text: the document as written.
        data: the same as dicts, lists and scalars.
        lines: line (from 1) of every key and list item, by path.

    """

    text: str
    data: Any
    lines: dict[Path, int] = field(repr=False)

    def place(self, finding: Finding) -> Finding:
        """Return `finding` with the line of its path, or of the nearest enclosing value."""
        for end in range(len(finding.path), -1, -1):
            line = self.lines.get(finding.path[:end])
            if line:
                return Finding(finding.what, finding.fix, finding.path, line)
        return finding


class _Reader:
    """Walks the nodes of one document; collects mistakes instead of stopping at the first."""

    def __init__(self, loader: yaml.SafeLoader) -> None:
        self.loader = loader
        self.lines: dict[Path, int] = {}
        self.findings: list[Finding] = []
        self.count = 0

    def read(self, node: yaml.Node, path: Path) -> Any:
        self.count += 1
        if self.count > _MAX_NODES:
            raise RecipeError(Finding(f"the recipe expands to more than {_MAX_NODES} values"))
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*path, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self.read_mapping(node, path)
        return self.loader.construct_object(node)

    def read_mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        self.loader.flatten_mapping(node)
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
            here = (*path, key)
            line = key_node.start_mark.line + 1
            if key in mapping:
                what = f'"{key}" is given twice; the first is on line {self.lines[here]}'
                self.findings.append(Finding(what, path=here, line=line))
                continue
            self.lines[here] = line
            mapping[key] = self.read(value_node, here)
        return mapping


def parse(text: str) -> Document:
    """Parse YAML `text`.

    Raises:
        RecipeError: it is not YAML, not one document, uses tags that would run code, or has
            duplicate keys.

    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise RecipeError(Finding("the recipe is empty"))
        reader = _Reader(loader)
        data = reader.read(node, ())
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        what = f"not valid YAML: {error.problem or error}"
        raise RecipeError(Finding(f"line {line}: {what}" if line else what, line=line)) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(Finding(f"not valid YAML: {error}")) from None
    finally:
        loader.dispose()
    if reader.findings:
        raise RecipeError(*reader.findings)
    if not isinstance(data, dict):
        raise RecipeError(Finding("a recipe is a mapping of keys to values"))
    return Document(text, data, reader.lines)


def unknown(kind: str, word: str, known: tuple[str, ...]) -> str:
    """Say that `word` is no `kind`, with the nearest known one and the whole list."""
    return f'unknown {kind} "{word}"{nearest(word, known)} Known: {", ".join(known)}.'

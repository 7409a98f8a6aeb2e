"""Owns YAML: a text becomes plain data plus the line of every value. Knows nothing of recipes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

import yaml

from moeforge.errors import Finding, Path, RecipeError, nearest

_MAX_NODES = 200_000
"""Values a document may expand to; aliases of aliases would otherwise fill the memory."""

_TAG = "tag:yaml.org,2002:"
_BEGIN = "`moeforge new` writes a recipe to begin with."
_FIXES = {
    "'\\t'": "Indent with spaces, not with tabs.",
    "mapping values are not allowed": (
        "A key's colon needs a space behind it, and a text with a colon and a space quotes."
    ),
    "<block end>": "Entries of one list or mapping are indented alike.",
    "unexpected end of stream": "A quote or bracket is not closed.",
    "another document": "A recipe is one document: remove the line ---.",
}
"""What helps with a mistake in YAML, by words of its message."""


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
        for end in range(len(finding.path), -1 if finding.path else 0, -1):
            line = self.lines.get(finding.path[:end])
            if line:
                return replace(finding, line=line)
        return finding


Pairs = dict[str, tuple[yaml.Node, yaml.Node]]
"""Nodes of keys and their values, by key."""


class _Reader:
    """Walks the nodes of one document; collects mistakes instead of stopping at the first."""

    def __init__(self, loader: yaml.SafeLoader) -> None:
        self.loader = loader
        self.lines: dict[Path, int] = {}
        self.findings: list[Finding] = []
        self.count = 0
        self._open: list[yaml.Node] = []
        self._pairs: dict[yaml.Node, Pairs] = {}

    def read(self, node: yaml.Node, path: Path) -> Any:
        self.count += 1
        if self.count > _MAX_NODES:
            raise RecipeError(Finding(f"the recipe expands to more than {_MAX_NODES} values"))
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            return self.read_scalar(node, path)
        kind = "map" if isinstance(node, yaml.MappingNode) else "seq"
        if node.tag != _TAG + kind:
            tag, line = node.tag.replace(_TAG, "!!"), node.start_mark.line + 1
            self.findings.append(Finding(f"the tag {tag} has no place in a recipe", "", path, line))
            return None
        if node in self._open:
            what = "the alias (*) here stands for a value that it is part of"
            self.findings.append(Finding(what, path=path, line=self.lines[path]))
            return None
        self._open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self.read_mapping(node, path)
            return [self.read(item, (*path, i)) for i, item in enumerate(node.value)]
        finally:
            self._open.pop()

    def read_scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        shown = node.value if len(node.value) <= 30 else f"{node.value[:30]}…"
        try:
            return self.loader.construct_object(node)
        except ValueError:  # a number of thousands of digits, 2024-13-45
            what = f"{shown} is neither a number nor a date; put it in quotes if it is a text"
        except (LookupError, AttributeError):  # how PyYAML fails at !!bool maybe, !!timestamp soon
            tag = node.tag.replace(_TAG, "!!")
            what = f'"{shown}" is not what the tag {tag} says; leave it out'
        self.findings.append(Finding(what, path=path, line=node.start_mark.line + 1))
        return None

    def read_mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key, (key_node, value_node) in self.pairs(node, path).items():
            here = (*path, key)
            self.lines[here] = key_node.start_mark.line + 1
            mapping[key] = self.read(value_node, here)
        return mapping

    def pairs(self, node: yaml.MappingNode, path: Path) -> Pairs:
        """Return the entries of `node`: those that `<<` brings, unless it has its own."""
        if node in self._pairs:
            return self._pairs[node]
        own, merged = Pairs(), Pairs()
        self._pairs[node] = own  # a node that merges itself adds nothing
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == _TAG + "merge":
                several = isinstance(value_node, yaml.SequenceNode)
                for source in value_node.value if several else [value_node]:
                    if not isinstance(source, yaml.MappingNode):
                        self.findings.append(Finding("<< takes a mapping", "", path, line))
                        continue
                    merged = {**self.pairs(source, path), **merged}
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self.findings.append(Finding("a key is a word, not a list", "", path, line))
                continue
            key = key_node.value
            if key in own:
                first = own[key][0].start_mark.line + 1
                what = f'"{key}" is given twice; the first is on line {first}'
                self.findings.append(Finding(what, path=(*path, key), line=line))
                continue
            own[key] = (key_node, value_node)
        self._pairs[node] = {**merged, **own}
        return self._pairs[node]


def parse(text: str) -> Document:
    """Parse YAML `text`.

    Raises:
        RecipeError: it is not YAML, not one document, uses tags that would run code, or has
            duplicate keys.
    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            raise RecipeError(Finding("the recipe is empty", _BEGIN))
        reader = _Reader(loader)
        data = reader.read(node, ())
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        what = f"not valid YAML: {error.problem or error}"
        fix = next((fix for word, fix in _FIXES.items() if word in what), "")
        raise RecipeError(Finding(what, fix, line=line)) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        what = f"not valid YAML: it has the character {chr(error.character)!r}"
        raise RecipeError(Finding(what, line=line)) from None
    except RecursionError:
        raise RecipeError(Finding("not a recipe: it is nested too deeply")) from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(Finding(f"not valid YAML: {error}")) from None
    finally:
        if loader:
            loader.dispose()
    if reader.findings:
        raise RecipeError(*sorted(reader.findings, key=lambda finding: finding.line))
    if data is None:
        raise RecipeError(Finding("the recipe is empty", _BEGIN))
    if not isinstance(data, dict):
        kind = "a list" if isinstance(data, list) else "a single value"
        what = f"a recipe is a mapping of keys to values, and this is {kind}"
        raise RecipeError(Finding(what, _BEGIN, line=reader.lines[()]))
    return Document(text, data, reader.lines)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Line separators other than \n survive only as escapes.
    style = '"' if set(text) & set("\r\x85\u2028\u2029") else None
    return dumper.represent_scalar(_TAG + "str", text, style=style)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_multi_representer(PurePath, lambda dumper, path: dumper.represent_str(str(path)))


def dump(data: dict[str, Any]) -> str:
    """Write `data` as a YAML document; paths become strings.

    Raises:
        RecipeError: it holds what YAML cannot say.
    """
    try:
        return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    except yaml.representer.RepresenterError as error:
        what = f"a recipe is made of dicts, lists, texts and numbers, not {error.args[-1]!r}"
        raise RecipeError(Finding(what)) from None
    except RecursionError:
        raise RecipeError(Finding("not a recipe: it is nested too deeply")) from None


def unknown(kind: str, word: str, known: tuple[str, ...]) -> str:
    """Say that `word` is no `kind`, with the nearest known one and the whole list."""
    word = word if len(word) <= 60 else f"{word[:57]}…"
    return f'unknown {kind} "{word}"{nearest(word, known) or "."} Known: {", ".join(known)}.'

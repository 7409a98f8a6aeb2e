"""Owns reading the cards of parents: a few keys, each of the right form, and nothing else.

Cards are written by strangers. What is not as the Hub wants it counts as not said.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeforge.output.cards.licences import KINDS

_LOOKED_AT = 2_000_000
"""Bytes of a card; results of benchmarks make some front matters a megabyte long."""
_PARSED = 50_000
"""Characters of the keys below, of all together."""
_MOST = 200
"""Entries of a list."""
_WANTED = ("license", "license_name", "license_link", "language", "datasets")
_KEY = re.compile(r"""["']?([\w.-]+)["']?\s*:(\s|$)""")
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,95}")
_LINK = re.compile(r"https?://[\w.-]+(:\d+)?(/[\w.~%/+@=,?#-]*)?")
_FILE = re.compile(r"LICENSE(\.md|\.txt)?", re.IGNORECASE)
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|multilingual|code")
_DATASET = re.compile(r"(?=.{1,96}$)([A-Za-z0-9][\w-]*(\.[\w-]+)*/)?[A-Za-z0-9][\w-]*(\.[\w-]+)*")


@dataclass(frozen=True)
class Said:
    """What a card says of its model; empty where it says nothing that can be used."""

    license: str = ""
    license_name: str = ""
    license_link: str = ""
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()


def read_card(folder: Path | None, repo: str = "") -> Said:
    """Return what the card in `folder` says.

    Args:
        folder: of a model or adapter; None for none.
        repo: its id on the Hub, for links to files in it.
    """
    data = _front_matter(folder / "README.md") if folder else {}
    license = _license(data.get("license"))
    name, link = data.get("license_name"), data.get("license_link")
    other = license == "other"
    return Said(
        license,
        name if other and isinstance(name, str) and _NAME.fullmatch(name) else "",
        _link(link, repo) if other else "",
        tuple(_fitting(_texts(data.get("language"), _language), _LANGUAGE)),
        tuple(_fitting(_texts(data.get("datasets"), str), _DATASET)),
    )


def _front_matter(path: Path) -> dict[str, Any]:
    """Return the wanted keys of the front matter of `path`; nothing where it cannot be read."""
    import yaml

    try:
        if not path.is_file():
            return {}
        with path.open("rb") as file:
            text = file.read(_LOOKED_AT).decode("utf-8", errors="replace")
        blocks = "\n".join(_wanted(text))
        data = yaml.safe_load(blocks) if len(blocks) <= _PARSED else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}


def _wanted(text: str) -> Iterator[str]:
    """Yield the lines of the front matter that belong to wanted keys, so that little is parsed."""
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return
    taken = False
    for line in lines[1:]:
        if line.rstrip() == "---":
            return
        if key := _KEY.match(line):
            taken = key[1] in _WANTED
        if taken:
            yield line


def _license(value: Any) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    word = value.strip().lower() if isinstance(value, str) else ""
    return word if word in KINDS else ""


def _link(value: Any, repo: str) -> str:
    if not isinstance(value, str) or len(value) > 500:
        return ""
    if _FILE.fullmatch(value):
        return f"https://huggingface.co/{repo}/blob/main/{value}" if repo else ""
    return value if _LINK.fullmatch(value) else ""


def _language(value: Any) -> str:
    # YAML takes the code of Norwegian for a boolean.
    word = "no" if value is False else str(value)
    return word.lower() if len(word) <= 3 else word


def _texts(value: Any, written: Callable[[Any], str]) -> Iterator[str]:
    """Yield the texts of a value that may be one of them or a list."""
    for entry in (value if isinstance(value, list) else [value])[:_MOST]:
        if isinstance(entry, (str, bool)):
            yield written(entry)


def _fitting(words: Iterable[str], pattern: re.Pattern[str]) -> Iterator[str]:
    seen = dict.fromkeys(word for word in words if pattern.fullmatch(word))
    yield from seen

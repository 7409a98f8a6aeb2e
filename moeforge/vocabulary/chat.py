"""Owns chat templates: the built-in ones, whether a text is one, and where a folder keeps its own.

The word in the recipe is the name of a file in templates/.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from moeforge.errors import Finding, SourceError
from moeforge.texts import read_text

_TEMPLATES = Path(__file__).parent / "templates"
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


def names() -> tuple[str, ...]:
    """Return the names of the built-in templates, sorted."""
    return tuple(sorted(file.stem for file in _TEMPLATES.glob("*.jinja")))


def built_in(name: str) -> str:
    """Return the built-in template `name`."""
    return (_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def problem(template: str) -> str:
    """Return what is wrong with `template` as Jinja, in the dialect of transformers; else ""."""
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    try:
        # transformers' own tag around what a model says; nothing else knows it.
        environment.from_string(_GENERATION.sub("", template))
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    return ""


def read_template(folder: Path | None) -> str | None:
    """Return the chat template of the tokenizer in `folder`; None where it has none.

    Raises:
        SourceError: a file that should hold it is damaged.
    """
    if folder is None:
        return None
    alone = folder / "chat_template.jinja"
    name = alone.name
    try:
        if alone.exists():
            return read_text(alone)
        for name in ("tokenizer_config.json", "chat_template.json"):
            if (folder / name).exists():
                data = json.loads(read_text(folder / name))
                found = data.get("chat_template")
                if isinstance(found, list):  # several, each with a name
                    found = {entry["name"]: entry["template"] for entry in found}.get("default")
                if isinstance(found, str):
                    return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        what = f"{folder / name} holds no chat template that can be read: {error}"
        raise SourceError(Finding(what, "Download the model again.")) from None
    return None


def most_common(templates: Iterable[str | None]) -> str | None:
    """Return the most common of `templates`, blanks around it apart; the first of equals."""
    counts = Counter(template.strip() for template in templates if template)
    return max(counts, key=counts.__getitem__, default=None)


def write_template(folder: Path, template: str) -> None:
    """Make `template` the only chat template of the tokenizer in `folder`.

    It is written twice: transformers reads chat_template.jinja from 4.51 on, older versions and
    other engines the key in tokenizer_config.json.
    """
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    config["chat_template"] = template
    text = json.dumps(config, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")

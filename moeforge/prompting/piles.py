"""Owns piles of prompts: what of a prompt is compared, which are worth it, and their files.

Knows prompt files; knows no embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeforge.errors import BuildError, Finding, RecipeError
from moeforge.output.staging import staging
from moeforge.recipe import Prompt, prompts


@dataclass(frozen=True)
class Pile:
    """The prompts of one expert.

    Attributes:
        label: how messages and files call it.
        prompts: all of them.
        fixed: so many of the first are kept whatever is selected.
    """

    label: str
    prompts: tuple[Prompt, ...]
    fixed: int = 0


def _content(message: Mapping[str, Any]) -> str:
    content = message["content"]
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "\n".join(text for text in texts if isinstance(text, str))


def text_of(prompt: Prompt) -> str:
    """Return what of a prompt is compared: its text, or the texts of its messages.

    The words of a chat template are the same in all chats and say nothing about one.
    """
    return prompt.text or "\n\n".join(map(_content, prompt.messages))


def distinct(texts: Sequence[str]) -> list[int]:
    """Return the numbers of texts that are not blank and have not been met before."""
    first: dict[str, int] = {}
    for number, text in enumerate(texts):
        if text.strip():
            first.setdefault(text, number)
    return list(first.values())


def read(path: Path) -> tuple[Prompt, ...]:
    """Read a prompts file.

    Raises:
        RecipeError: with file and line, where it cannot be read, has another ending, or is empty.
    """
    try:
        return prompts.load(path)
    except ValueError as error:
        raise RecipeError(Finding(str(error))) from None


def labels(names: Sequence[str]) -> list[str]:
    """Return a file name without ending for each path or model id, all of them different.

    The last part where these differ, else with the number of the entry in front.
    """
    short = [Path(name.rstrip("/")).name or "prompts" for name in names]
    if len({name.casefold() for name in short}) == len(short):
        return short
    return [f"{number}-{name}" for number, name in enumerate(short, 1)]


def refuse_existing(out: Path) -> None:
    """Refuse to write into what stands at `out`.

    Raises:
        BuildError: something does.
    """
    if out.exists() or out.is_symlink():
        raise BuildError(Finding(f"{out} exists", "Choose another folder with -o, or remove it."))


def _line(prompt: Prompt) -> bytes:
    entry = {"messages": list(prompt.messages)} if prompt.messages else {"text": prompt.text}
    try:
        return json.dumps(entry, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which only an escape can write
        return json.dumps(entry).encode("utf-8")


def write(out: Path, files: Mapping[str, Sequence[Prompt]]) -> None:
    """Write prompts to `out`/LABEL.jsonl, which recipes take as `prompts_file`.

    The folder appears whole, or not at all.

    Raises:
        BuildError: it exists, or the disk refuses.
    """
    with staging(out, overwrite=False) as work:
        try:
            for label, entries in files.items():
                lines = b"".join(_line(prompt) + b"\n" for prompt in entries)
                (work / f"{label}.jsonl").write_bytes(lines)
        except OSError as error:
            raise BuildError(Finding(f"cannot write to {out}: {error.strerror}")) from error

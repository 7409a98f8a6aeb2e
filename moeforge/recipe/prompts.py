"""Owns prompt files: `.txt` with a blank line between prompts, `.jsonl` with texts or chats."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeforge.texts import read_text

Message = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A text, or a chat whose `messages` go through the tokenizer's chat template."""

    text: str = ""
    messages: tuple[Message, ...] = field(default=(), hash=False)  # dicts cannot be hashed


def _from_json(line: str) -> Prompt:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not a prompt: it is nested too deeply") from None
    if isinstance(entry, dict) and isinstance(entry.get("text"), str):
        if not entry["text"]:
            raise ValueError("the text is empty")
        return Prompt(text=entry["text"])
    messages = entry.get("messages") if isinstance(entry, dict) else None
    if (
        isinstance(messages, list)
        and messages
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)
    ):
        return Prompt(messages=tuple(messages))
    raise ValueError('expected {"text": "…"} or {"messages": [{"role": …, "content": …}, …]}')


def load(path: Path) -> tuple[Prompt, ...]:
    """Read the prompts of `path`.

    Raises:
        ValueError: with file and line, where it cannot be read, has another ending, or is empty.
    """
    try:
        text = read_text(path, encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: cannot be read: {reason}") from None
    prompts: list[Prompt] = []
    if path.suffix == ".jsonl":
        # Not splitlines(): JSON strings may hold other line separators as they are.
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                prompts.append(_from_json(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    elif path.suffix == ".txt":
        blocks = (block.strip("\n") for block in re.split(r"\n(?:[ \t]*\n)+", f"\n{text}\n"))
        prompts = [Prompt(text=block) for block in blocks if block.strip()]
    else:
        raise ValueError(f"{path}: a prompts file ends in .txt or .jsonl")
    if not prompts:
        raise ValueError(f"{path}: no prompts in it")
    return tuple(prompts)

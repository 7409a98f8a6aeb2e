"""Owns what an output's tokenizer files say other than its donor's, and writing that."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeforge.errors import BuildError, Finding
from moeforge.texts import refuse_links
from moeforge.vocabulary import Tokens
from moeforge.vocabulary.chat import write_template

_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "vocab.json",
    "vocab.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates",
)
"""What makes up a tokenizer on disk, of any age."""

_SUPERSEDED = ("tokenizer*", "added_tokens.json", "merges.txt", "vocab.*", "*.model", "*.tiktoken")
"""Those that list tokens: wrong once tokenizer.json is another."""


ID_ENDINGS = ("_token_id", "_token_index")
"""How keys of a config end that hold ids; the second is LLaVA's and Gemma 3's."""


def renumber(config: dict[str, Any], old: Tokens, new: Tokens, size: int) -> dict[str, Any]:
    """Return a config whose ids of tokens mean the same tokens with `new` as before with `old`.

    A token that `new` does not have is replaced by the one that has its role there; None where
    there is none. An id that `old` has no token for stays if the new embeddings have such a row.

    Args:
        config: content of config.json or generation_config.json.
        old: the tokenizer that the ids are of.
        new: the tokenizer of the result.
        size: rows of the result's embeddings.
    """

    def moved(key: str, index: int) -> int | None:
        if index not in old.names:
            return index if index < size else None
        role = new.role(key.removesuffix("_id").removesuffix("_index"))
        return new.ids.get(old.names[index], new.ids.get(role) if role else None)

    result = dict(config)
    for key, value in config.items():
        if not key.endswith(ID_ENDINGS):
            continue
        if isinstance(value, int):
            result[key] = moved(key, value)
        elif isinstance(value, list):
            found = dict.fromkeys(moved(key, index) for index in value)
            result[key] = [index for index in found if index is not None] or None
    return result


@dataclass(frozen=True, eq=False)
class TokenizerChange:
    """How the tokenizer of an output differs from that of its donor.

    Attributes:
        before: the tokenizer in the donor's folder.
        tokens: the output's tokenizer; None, as `before` and `size`, where the files stay.
        size: rows of the output's embeddings.
        chat_template: the template in Jinja; None leaves what comes with the tokenizer.
    """

    before: Tokens | None = None
    tokens: Tokens | None = None
    size: int | None = None
    chat_template: str | None = None

    def write(self, folder: Path) -> None:
        """Bring the files of `folder`, copied from the donor, in line.

        Raises:
            BuildError: transformers reads other ids from what was written.
            SourceError: a file of the tokenizer is a link to something of another name.
        """
        if self.tokens is not None and self.before is not None and self.size is not None:
            self._write_tokens(self.tokens, folder)
            generation = folder / "generation_config.json"
            if generation.exists():
                old = json.loads(generation.read_text(encoding="utf-8"))
                new = renumber(old, self.before, self.tokens, self.size)
                if new != old:
                    _write_json(generation, new)
        if self.chat_template is not None:
            write_template(folder, self.chat_template)

    def _write_tokens(self, tokens: Tokens, folder: Path) -> None:
        for item in list(_matching(folder, _FILES)):
            shutil.rmtree(item) if item.is_dir() else item.unlink()
        for item in _matching(tokens.folder, _FILES):
            if tokens.made and any(fnmatch.fnmatch(item.name, p) for p in _SUPERSEDED):
                continue
            refuse_links(item)
            if item.is_dir():
                shutil.copytree(item, folder / item.name)
            else:
                shutil.copyfile(item, folder / item.name)
        if tokens.made:
            _write_json(folder / "tokenizer.json", dict(tokens.backend))
            _write_json(folder / "tokenizer_config.json", dict(tokens.config))
            _forget_gone(folder / "special_tokens_map.json", tokens)
            _verify(tokens, folder)


def _matching(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    for item in sorted(folder.iterdir()):
        if any(fnmatch.fnmatch(item.name, pattern) for pattern in patterns):
            yield item


def _write_json(path: Path, data: dict[str, Any]) -> None:
    text = json.dumps(data, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _forget_gone(path: Path, tokens: Tokens) -> None:
    """Take tokens that the tokenizer no longer has out of special_tokens_map.json."""
    if path.exists():
        special = json.loads(path.read_text(encoding="utf-8"))
        known = {key: value for key, value in special.items() if tokens.has(value)}
        if known != special:
            _write_json(path, known)


def _verify(tokens: Tokens, folder: Path) -> None:
    """Reload what was written; ids that moved would silently pair tokens with other rows."""
    from transformers import AutoTokenizer

    fix = "Choose the tokenizer of another model, or tell the authors of moeforge."
    try:
        # Else transformers would ask on the terminal whether to run code that lies beside it.
        found = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False).get_vocab()
    except Exception as error:  # transformers raises many kinds
        what = f"the tokenizer made of {tokens.label}'s cannot be loaded: {error}"
        raise BuildError(Finding(what, fix)) from error
    moved = [token for token, index in tokens.ids.items() if found.get(token) != index]
    if moved:
        token = min(moved, key=tokens.ids.__getitem__)
        what = (
            f"transformers reads {len(moved)} tokens of the new tokenizer differently: {token!r} "
            f"is {found.get(token)} instead of {tokens.ids[token]}"
        )
        raise BuildError(Finding(what, fix))

"""Owns what a tokenizer is here: its two JSON files as data, from which ids and tokens follow.

Knows no model and no tensor. transformers is imported only for tokenizers without a
tokenizer.json, and to reload what was written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from moeforge.errors import Finding, SourceError
from moeforge.texts import read_text
from moeforge.vocabulary.damage import damage

Settings = dict[str, Any]
"""How an added token is matched in text: the fields of an AddedToken, without id and content."""

_DEFAULT: Settings = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": True,
    "special": False,
}
_MODEL = '\n  "model": {'
"""Where the model begins in a file of the library tokenizers."""
ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""Keys of tokenizer_config.json whose values are special tokens."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """A tokenizer as data; compared by identity.

    Attributes:
        label: how messages call it.
        folder: where its other files lie, chat template and special_tokens_map.json among them.
        backend: content of tokenizer.json; `added_tokens` has all that transformers would add.
        config: content of tokenizer_config.json.
        made: it was composed here, so that the files in `folder` say something else.
    """

    label: str
    folder: Path
    backend: Mapping[str, Any]
    config: Mapping[str, Any]
    made: bool = False

    @cached_property
    def ids(self) -> dict[str, int]:
        """Id of every token, ordinary and added."""
        vocabulary = self.backend["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: pieces with scores, the place is the id
            ids = {piece: index for index, (piece, _) in enumerate(vocabulary)}
        else:
            ids = dict(vocabulary)
        for entry in self.backend["added_tokens"]:
            ids.setdefault(entry["content"], entry["id"])
        return ids

    @cached_property
    def names(self) -> dict[int, str]:
        """Token of every id."""
        return {index: token for token, index in self.ids.items()}

    @cached_property
    def added(self) -> dict[str, Settings]:
        """Settings of the added tokens."""
        return {e["content"]: settings(e) for e in self.backend["added_tokens"]}

    @cached_property
    def kind(self) -> str:
        """What its tokens are spelt in: the same string means the same text only within a kind."""
        steps = json.dumps([self.backend.get("pre_tokenizer"), self.backend.get("decoder")])
        level = "byte-level " if '"ByteLevel"' in steps else ""
        return level + str(self.backend["model"].get("type", "BPE"))

    def role(self, key: str) -> str | None:
        """Return the special token that `key`, such as "bos_token", names."""
        return content(self.config.get(key))

    def has(self, value: Any) -> bool:
        """Say whether it has the token, or all of the list of tokens, that `value` names."""
        if isinstance(value, list):
            return all(map(self.has, value))
        return content(value) in self.ids


def settings(entry: Mapping[str, Any]) -> Settings:
    """Return the settings of an added token that `entry` of a tokenizer file has."""
    return {key: entry.get(key, default) for key, default in _DEFAULT.items()}


def content(value: Any) -> str | None:
    """Return the token that a value of tokenizer_config.json means: text, or a mapping."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def present(folder: Path | None) -> bool:
    """Say whether `folder` has files of a tokenizer, of whatever kind."""
    return folder is not None and any((*folder.glob("tokenizer*"), *folder.glob("vocab.*")))


def read(folder: Path | None, label: str) -> Tokens:
    """Read the tokenizer in `folder`.

    Args:
        folder: folder of a checkpoint.
        label: how messages call it.

    Raises:
        SourceError: there is none, it is damaged, or it has no fast version.
    """
    if folder is None:
        raise SourceError(Finding(f"{label} has no tokenizer", "Add its tokenizer files."))
    config = _json(folder / "tokenizer_config.json", label)
    backend = _json(folder / "tokenizer.json", label) or _convert(folder, label)
    if reason := damage(backend, config):
        what = f"{label}: {reason}"
        raise SourceError(Finding(what, "Download the model again."))
    return Tokens(label, folder, _complete(backend, config, folder, label), config)


def _json(path: Path, label: str) -> dict[str, Any]:
    """Return the mapping in `path`; an empty one where there is no such file."""
    try:
        data = _loaded(read_text(path)) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        what = f"{label}: {path.name} cannot be read: {reason}"
        raise SourceError(Finding(what, "Download the model again.")) from None
    if not isinstance(data, dict):
        raise SourceError(Finding(f"{label}: {path.name} is not a mapping"))
    return data


def _loaded(text: str) -> Any:
    """Return what `text` says in JSON.

    Fine-tunes of one model add tokens and share the vocabulary, which is nearly all of a
    tokenizer.json and stands at its end. It is read once, and takes the memory of one.

    Raises:
        ValueError: it is no JSON.
    """
    start = text.find(_MODEL)
    if start < 0:
        return json.loads(text)
    try:
        # There are no line breaks within a string. So `text` is JSON if both parts are, and says
        # what both say.
        return {**json.loads(text[:start] + '"model": null}'), **_model(text[start:])}
    except (ValueError, RecursionError):
        return json.loads(text)  # says where it is broken


@lru_cache(maxsize=1)
def _model(text: str) -> dict[str, Any]:
    """Return what the end of a tokenizer.json says, from its model on; nobody writes on it."""
    loaded: dict[str, Any] = json.loads("{" + text)
    return loaded


def _convert(folder: Path, label: str) -> dict[str, Any]:
    """Return what tokenizer.json would be, from older files that transformers can convert."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # transformers raises many kinds for a broken or missing tokenizer
        lines = str(error).strip().splitlines() or [type(error).__name__]
        what = f"{label} has no tokenizer.json, and none can be made of its files: {lines[0]}"
        fix = "Only fast tokenizers can be merged; without `tokenizer` the base's is copied."
        raise SourceError(Finding(what, fix)) from error
    assert isinstance(backend, dict)
    return backend


def _complete(
    backend: dict[str, Any], config: dict[str, Any], folder: Path, label: str
) -> dict[str, Any]:
    """Add the tokens that only other files name, where and as transformers adds them on loading."""
    vocabulary = backend["model"]["vocab"]
    if isinstance(vocabulary, list):
        known = {piece: index for index, (piece, _) in enumerate(vocabulary)}
    else:
        known = vocabulary
    added = list(backend.get("added_tokens") or ())
    contents = {entry["content"] for entry in added}
    for token, how in _named(config, folder, label):
        if token in contents:
            continue
        last = max((entry["id"] for entry in added), default=-1)
        index = known.get(token, max(len(known), last + 1))
        added.append({"id": index, "content": token, **how})
        contents.add(token)
    return {**backend, "added_tokens": added}


def _named(config: dict[str, Any], folder: Path, label: str) -> Iterator[tuple[str, Settings]]:
    """Yield the added tokens that the files beside tokenizer.json name, in transformers' order."""
    decoder = config.get("added_tokens_decoder")
    special: Mapping[str, Any] = config
    if isinstance(decoder, dict):
        for _, entry in sorted(decoder.items(), key=lambda item: int(item[0])):
            yield entry["content"], settings(entry)
    else:  # files of older versions
        special = {**_json(folder / "special_tokens_map.json", label), **config}
        older = _json(folder / "added_tokens.json", label)
        if not all(type(index) is int for index in older.values()):
            what = f"{label}: added_tokens.json is not a mapping of tokens to ids"
            raise SourceError(Finding(what, "Download the model again."))
        for token, _ in sorted(older.items(), key=lambda item: int(item[1])):
            yield token, dict(_DEFAULT)
    extra = special.get("extra_special_tokens") or special.get("additional_special_tokens") or ()
    named = extra.values() if isinstance(extra, dict) else extra
    values = [special.get(role) for role in ROLES]
    for value in (*values, *(named if isinstance(named, Iterable) else ())):
        special_token = content(value)
        if special_token:
            how = value if isinstance(value, Mapping) else {}
            yield special_token, {**settings({"normalized": False, **how}), "special": True}

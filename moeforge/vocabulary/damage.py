"""Owns whether the files of a tokenizer have the shape that everything behind them counts on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MOST = 2**31
"""Ids are below it: no vocabulary comes near."""
_DEEPEST = 10


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _is_token(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("content"), str)


def _is_piece(entry: Any) -> bool:
    """Say whether `entry` is a piece of a Unigram model with its score."""
    pair = isinstance(entry, list) and len(entry) == 2
    return pair and isinstance(entry[0], str) and isinstance(entry[1], (int, float))


def _is_merge(entry: Any) -> bool:
    """Say whether `entry` is "a b" or ["a", "b"]."""
    parts = entry.split(" ", 1) if isinstance(entry, str) else entry
    return isinstance(parts, list) and len(parts) == 2 and all(isinstance(p, str) for p in parts)


def _is_processor(processor: Any, depth: int = 0) -> bool:
    """Say whether `processor` is a step after tokenizing, as far as it names tokens."""
    if processor is None:
        return True
    if not isinstance(processor, dict) or depth > _DEEPEST:
        return False
    if processor.get("type") == "Sequence":
        steps = processor.get("processors")
        return isinstance(steps, list) and all(_is_processor(step, depth + 1) for step in steps)
    if processor.get("type") == "TemplateProcessing":
        special = processor.get("special_tokens")
        return isinstance(special, dict) and all(
            isinstance(entry, dict) and _is_texts(entry.get("tokens")) for entry in special.values()
        )
    pairs = [processor[key] for key in ("sep", "cls") if key in processor]
    return all(isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) for p in pairs)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def damage(backend: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return why these are not the files of a tokenizer, or "".

    Args:
        backend: content of tokenizer.json.
        config: content of tokenizer_config.json.
    """
    model = backend.get("model")
    if not isinstance(model, dict):
        return "tokenizer.json has no vocabulary"
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        odd = next((token for token, index in vocabulary.items() if not _is_id(index)), None)
        if odd is not None:
            return f"tokenizer.json gives {odd[:40]!r} the id {str(vocabulary[odd])[:40]!r}"
    elif not isinstance(vocabulary, list) or not all(map(_is_piece, vocabulary)):
        return "tokenizer.json has no vocabulary"
    merges, prefix = model.get("merges") or [], model.get("continuing_subword_prefix") or ""
    if not isinstance(merges, list) or not all(map(_is_merge, merges)):
        return "tokenizer.json has merges that are not pairs of tokens"
    if not isinstance(prefix, str):
        return "tokenizer.json has a continuing_subword_prefix that is not a text"
    if not _is_processor(backend.get("post_processor")):
        return "tokenizer.json has a post_processor that cannot be read"
    added = backend.get("added_tokens") or []
    if not isinstance(added, list) or not all(_is_token(e) and _is_id(e.get("id")) for e in added):
        return "tokenizer.json has added_tokens that are not tokens with ids"
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict) and not all(
        key.isdecimal() and len(key) < 11 and _is_token(entry) for key, entry in decoder.items()
    ):
        return "tokenizer_config.json has added_tokens_decoder that is not tokens by id"
    return ""

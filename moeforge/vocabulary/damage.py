"""Owns whether the files of a tokenizer have the shape that everything behind them counts on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import chain, repeat
from operator import contains
from typing import Any

_MOST = 2**31
"""Ids are below it: no vocabulary comes near."""
_DEEPEST = 10


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _is_token(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("content"), str)


# What there is a hundred thousand of is looked at all at once: that is most of what reading costs.


def _types(values: Iterable[Any]) -> set[type]:
    return set(map(type, values))


def _are_ids(values: Collection[Any]) -> bool:
    return _types(values) <= {int} and 0 <= min(values, default=0) <= max(values, default=0) < _MOST


def _are_pairs(entries: Iterable[Any]) -> bool:
    return _types(entries) <= {list} and set(map(len, entries)) <= {2}


def _are_pieces(entries: list[Any]) -> bool:
    """Say whether `entries` are the pieces of a Unigram model, each with its score."""
    if not _are_pairs(entries):
        return False
    pieces, scores = ([entry[place] for entry in entries] for place in (0, 1))
    return _types(pieces) <= {str} and _types(scores) <= {int, float, bool}


def _are_merges(entries: list[Any]) -> bool:
    """Say whether each of `entries` is "a b" or ["a", "b"]."""
    texts = [entry for entry in entries if type(entry) is str]
    pairs = [entry for entry in entries if type(entry) is not str]
    return (
        all(map(contains, texts, repeat(" ")))
        and _are_pairs(pairs)
        and _types(chain.from_iterable(pairs)) <= {str}
    )


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
        if not _are_ids(vocabulary.values()):
            odd = next(token for token, index in vocabulary.items() if not _is_id(index))
            return f"tokenizer.json gives {odd[:40]!r} the id {str(vocabulary[odd])[:40]!r}"
    elif not isinstance(vocabulary, list) or not _are_pieces(vocabulary):
        return "tokenizer.json has no vocabulary"
    merges, prefix = model.get("merges") or [], model.get("continuing_subword_prefix") or ""
    if not isinstance(merges, list) or not _are_merges(merges):
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

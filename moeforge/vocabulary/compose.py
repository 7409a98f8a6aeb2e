"""Owns the ids of a new tokenizer and the tokenizer that has them; knows no tensor.

Ids are the same in every process: the first tokenizer's tokens keep theirs, then come the new
tokens of each other tokenizer, in ascending order of their ids there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from moeforge.errors import Finding, PlanError
from moeforge.vocabulary import ROLES, Settings, Tokens, content, settings

Counted = tuple[Tokens, int]
"""A tokenizer, and how many rows its model's embeddings have: ids from there on cannot be used."""


def usable(tokens: Tokens, rows: int) -> dict[str, int]:
    """Return the ids below `rows`."""
    return {token: index for token, index in tokens.ids.items() if index < rows}


def extend(ids: dict[str, int], tokens: Iterable[str]) -> None:
    """Give those of `tokens` that `ids` lacks the next ids, in their order."""
    following = max(ids.values(), default=-1) + 1
    for token in tokens:
        if token not in ids:
            ids[token] = following
            following += 1


def union(first: Counted, others: Sequence[Counted]) -> dict[str, int]:
    """Return the ids of all tokens that have a row in some model."""
    ids = usable(*first)
    for tokens, rows in others:
        if tokens.ids != first[0].ids:
            theirs = usable(tokens, rows)
            extend(ids, sorted(theirs.keys() - ids.keys(), key=theirs.__getitem__))
    return ids


def compose(
    first: Tokens, others: Sequence[Tokens], ids: dict[str, int], *, ordinary: bool
) -> Tokens:
    """Return `first` with the tokens of `ids`; `first` itself where that changes nothing.

    Args:
        first: the tokenizer that everything but the tokens comes from.
        others: tokenizers that the new tokens may come from, with their settings.
        ids: the tokens of the result.
        ordinary: the result does what all of them do: what any of them has as an added token is
            one, the others' ordinary tokens stay ordinary, and their BPE merges come after those
            of `first`, as without them those tokens would never occur. Without it, `first` stays
            as it is, and all new tokens are added tokens.

    Raises:
        PlanError: ordinary tokens would have to be added to a kind that cannot have more.
    """
    known = _settings((first, *others))
    added = dict(known) if ordinary else dict(first.added)
    for token in ids.keys() - first.ids.keys():
        if not ordinary or not any(token in other.ids for other in others):
            added[token] = known.get(token, settings({}))
    added = {token: how for token, how in added.items() if token in ids}
    if ids == first.ids and added == first.added:
        return first
    listed = [{"id": i, "content": t, **added[t]} for t, i in ids.items() if t in added]
    listed.sort(key=lambda entry: entry["id"])
    model = _model(first, others if ordinary else (), ids, added)
    processor = _renumber(first.backend.get("post_processor"), ids)
    backend = {**first.backend, "model": model, "added_tokens": listed, "post_processor": processor}
    config = _config(first, ids, listed)
    return Tokens(first.label, first.folder, backend, config, made=True)


def _settings(tokenizers: Sequence[Tokens]) -> dict[str, Settings]:
    """Return the settings of all added tokens; the first tokenizer that has one decides."""
    added: dict[str, Settings] = {}
    for tokens in tokenizers:
        for token, how in tokens.added.items():
            added.setdefault(token, how)
    return added


def conflicts(tokenizers: Sequence[Tokens], ids: Mapping[str, int]) -> dict[str, list[str]]:
    """Return, by tokenizer, the tokens of `ids` that it adds with other settings than the first."""
    decided = _settings(tokenizers)
    found = {}
    for tokens in tokenizers:
        differing = [t for t, how in tokens.added.items() if how != decided[t] and t in ids]
        if differing:
            found[tokens.label] = differing
    return found


def _model(
    first: Tokens, others: Sequence[Tokens], ids: dict[str, int], added: Mapping[str, Settings]
) -> dict[str, Any]:
    """Return the `model` of tokenizer.json for `ids`.

    Added tokens stand in its vocabulary too: `tokenizers` gives those that do not an id by count,
    whatever the file says.
    """
    model = dict(first.backend["model"])
    if isinstance(model["vocab"], list):
        ordinary = {token for token in ids if token not in added}
        if ordinary != {piece for piece, _ in model["vocab"]} - added.keys():
            what = f"{first.label} has a {first.kind} tokenizer, which cannot get other tokens"
            raise PlanError(Finding(what, "Use tokenizer: {source: base}."))
        return model
    model["vocab"] = dict(sorted(ids.items(), key=lambda item: item[1]))
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = dict.fromkeys(chain.from_iterable(map(_pairs, _merges((first, *others)))))
        model["merges"] = [
            [left, right]
            for left, right in pairs
            if left in ids and right in ids and left + right.removeprefix(prefix) in ids
        ]
    return model


def _merges(tokenizers: Iterable[Tokens]) -> list[list[Any]]:
    """Return the lists of merges, each once: models of one origin have the same."""
    found: list[list[Any]] = []
    for tokens in tokenizers:
        merges = tokens.backend["model"].get("merges") or []
        if merges not in found:
            found.append(merges)
    return found


def _pairs(merges: list[Any]) -> list[tuple[str, str]]:
    """Return the merges, which are written as "a b" or as ["a", "b"]."""
    return [tuple(m.split(" ", 1) if isinstance(m, str) else m) for m in merges]


def _renumber(processor: Any, ids: Mapping[str, int]) -> Any:
    """Return a post-processor whose special tokens have their ids in `ids`.

    Raises:
        PlanError: it puts in a token that is not there.
    """
    if isinstance(processor, list):
        return [_renumber(part, ids) for part in processor]
    if not isinstance(processor, dict):
        return processor
    result = dict(processor)
    try:
        if processor.get("type") == "Sequence":
            result["processors"] = _renumber(processor["processors"], ids)
        elif processor.get("type") == "TemplateProcessing":
            special = processor["special_tokens"].items()
            result["special_tokens"] = {
                name: {**entry, "ids": [ids[token] for token in entry["tokens"]]}
                for name, entry in special
            }
        else:
            for key in {"sep", "cls"} & processor.keys():  # [token, id]
                result[key] = [processor[key][0], ids[processor[key][0]]]
    except KeyError as error:
        what = f"the tokenizer puts {error} around every text, but it has no row in the embeddings"
        raise PlanError(Finding(what, "Use the tokenizer of another model.")) from None
    return result


def _config(first: Tokens, ids: Mapping[str, int], listed: list[dict[str, Any]]) -> dict[str, Any]:
    """Return tokenizer_config.json without tokens that are gone, and with those that are new."""
    config = dict(first.config)
    for role in ROLES:
        if first.role(role) is not None and first.role(role) not in ids:
            del config[role]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(config.get(key), list):
            config[key] = [value for value in config[key] if content(value) in ids]
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = {
            str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in listed
        }
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 4 knows this name only
    return config

"""Owns the front matter of a card: what the Hub reads, and what users changed in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from moeforge.output.cards.facts import Facts
from moeforge.output.cards.licences import together

_TASKS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}
_KINDS = {"moe": ("moe",), "regrouping": ("moe",), "stack": ("frankenmerge",)}


def pipeline(config: Mapping[str, Any], *, sentences: bool) -> str:
    """Return the Hub's word for the task of a model; "" where none is known.

    Args:
        config: its config.json.
        sentences: whether it is a sentence-transformers model.
    """
    name = str((config.get("architectures") or [""])[0])
    if sentences:
        return "sentence-similarity"
    if name.endswith("ForConditionalGeneration"):
        return "image-text-to-text" if "vision_config" in config else ""
    known = next((task for end, task in _TASKS.items() if name.endswith(end)), "")
    # What has no head gives the vectors of tokens.
    return known or ("feature-extraction" if name.endswith("Model") else "")


def generated(facts: Facts) -> dict[str, Any]:
    """Return the front matter that follows from `facts`, in the order of the file."""
    from huggingface_hub import ModelCardData

    licence = together(facts.parents)
    repos = _union([parent.repo] for parent in facts.parents if parent.repo)
    data = ModelCardData(
        base_model=repos or None,
        base_model_relation="merge" if repos else None,
        library_name="sentence-transformers" if facts.sentences else "transformers",
        pipeline_tag=facts.pipeline or None,
        license=licence.license or None,
        license_name=licence.name or None,
        license_link=licence.link or None,
        language=_union(parent.languages for parent in facts.parents) or None,
        datasets=_union(parent.datasets for parent in facts.parents) or None,
        tags=[
            *("merge", *_KINDS.get(facts.kind, ()), "moeforge"),
            *(method.word for method in facts.methods),
            *([facts.model_type] if facts.model_type else []),
        ],
    )
    found: dict[str, Any] = data.to_dict()  # type: ignore[no-untyped-call]
    return found


def _union(lists: Iterable[Iterable[str]]) -> list[str]:
    return list(dict.fromkeys(word for words in lists for word in words))


def changed(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of front matter `now` that are not as in `before`; None for those removed."""
    keys = [*now, *(key for key in before if key not in now)]
    return {key: now.get(key) for key in keys if now.get(key) != before.get(key)}


def with_changes(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return front matter `data` with what `changed` found."""
    return {key: value for key, value in {**data, **changes}.items() if value is not None}


def written(data: Mapping[str, Any]) -> str:
    """Return front matter as the text between and with its two lines of dashes."""
    import yaml

    text = yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True)
    return f"---\n{text.strip()}\n---"

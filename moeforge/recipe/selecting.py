"""Owns the recipe language of choosing prompts: `select` of an expert, `embedding_model` of all.

Knows the words; `moeforge.prompting` knows what they do.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator
from pydantic_core.core_schema import ValidationInfo

from moeforge.recipe.strict import Strict, Written, show, wrong

EMBEDDING_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""What prompts are compared with by default: 90 MB, Apache-2.0, no code of its own.

Trained on English; it still tells other languages apart (see `moeforge.prompting.overlap`). It
reads the first 256 tokens of a text.
"""


def _count(value: Any) -> Any:
    if value is not None and (type(value) is not int or value < 1):
        raise wrong(f"expected how many prompts to keep, at least 1, got {show(value)}")
    return value


class PromptFileKeys(Strict):
    """Where an expert's prompts come from, beside those that the recipe writes out.

    Attributes:
        prompts_file: `.txt` (blank line between prompts) or `.jsonl` (`{"text": …}` or
            `{"messages": […]}` per line), added to `positive_prompts`.
        select: keep so many of the prompts in `prompts_file`: those that stand for the others in
            it and are far from the other experts' prompts. None keeps all. `positive_prompts` are
            always kept, and not counted.
    """

    prompts_file: str | None = None
    select: Annotated[
        int | None, BeforeValidator(_count), Written({"type": ["integer", "null"], "minimum": 1})
    ] = None

    @field_validator("select")
    @classmethod
    def _from_a_file(cls, count: int | None, info: ValidationInfo) -> int | None:
        if count is not None and "prompts_file" in info.data and not info.data["prompts_file"]:
            raise wrong("select keeps some of the prompts in prompts_file, and there is none")
        return count


class EmbeddingKeys(Strict):
    """How prompts are compared.

    Attributes:
        embedding_model: a sentence-transformers model, or an encoder whose token vectors are
            averaged: a path, relative to the recipe or to the working directory, or a Hub id.
            Code that lies beside it is not run.
    """

    embedding_model: Annotated[str, Field(min_length=1)] = EMBEDDING_MODEL

"""Owns prompts becoming token ids, with the tokenizer and chat template of the base."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moeforge.errors import Finding, SourceError
from moeforge.gates import TokenizedPrompt
from moeforge.recipe import Prompt


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in `folder`.

    Raises:
        SourceError: there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        # transformers would ask on the terminal whether to run code that lies beside it.
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a broken or missing tokenizer
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        what = f"the tokenizer in {folder} cannot be loaded: {reason}"
        raise SourceError(Finding(what, "Add the tokenizer files of the base model.")) from error


def _ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    if not prompt.messages:
        return list(tokenizer(prompt.text)["input_ids"])
    if not tokenizer.chat_template:
        what = "a prompt is a chat (messages), but the base's tokenizer has no chat template"
        raise SourceError(Finding(what, "Give plain texts, or a base with a chat template."))
    try:
        rendered = tokenizer.apply_chat_template(list(prompt.messages), tokenize=False)
    except Exception as error:  # a template may raise anything; jinja's sandbox stops attacks
        what = f"the base's chat template cannot be rendered: {error}"
        raise SourceError(Finding(what, "Give plain texts, or a base with another one.")) from error
    # The template writes the special tokens itself.
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def tokenize(
    tokenizer: Any, prompts: Iterable[tuple[int, bool, Prompt]], most: int | None
) -> Sequence[TokenizedPrompt]:
    """Return `prompts` as token ids.

    Args:
        tokenizer: a transformers tokenizer.
        prompts: expert, whether it is a negative prompt, and the prompt.
        most: the base's context length; what is beyond it is cut off.

    Raises:
        SourceError: a prompt has no tokens, or needs a chat template that is not there.
    """
    result = []
    for expert, negative, prompt in prompts:
        ids = _ids(tokenizer, prompt)[:most]
        first = int(bool(ids) and ids[0] == tokenizer.bos_token_id)
        if len(ids) <= first:
            what = f"experts[{expert}] has a prompt without any token: {prompt.text[:40]!r}"
            raise SourceError(Finding(what, "Remove it."))
        result.append(TokenizedPrompt(expert, negative, tuple(ids), first))
    return result

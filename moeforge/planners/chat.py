"""Owns the chat template that a recipe means, found at planning so that mistakes show at once."""

from __future__ import annotations

from collections.abc import Sequence

from moeforge.errors import Path
from moeforge.planners.model import Findings, Model
from moeforge.vocabulary import chat, present


def chosen_template(
    setting: str | None, models: Sequence[Model], base: Model, path: Path, findings: Findings
) -> str | None:
    """Return the template that the recipe means; None where there is nothing to change."""
    if setting is None:
        return None
    if not present(base.donor.folder):
        what = f"chat_template needs a tokenizer, and {base.label} has none"
        findings.error(what, "Add its tokenizer files.", path)
        return None
    if setting == "auto":
        return chat.most_common(map(_template_of, models))
    if "{" not in setting:
        if setting in chat.names():
            return chat.built_in(setting)
        known = ", ".join(("auto", *chat.names()))
        what = f'chat_template "{setting}" is neither a built-in template nor Jinja'
        findings.error(what, f"Known: {known}; Jinja has {{{{ … }}}}.", path)
        return None
    if problem := chat.problem(setting):
        findings.error(f"chat_template is not valid Jinja: {problem}", "Correct it.", path)
        return None
    return setting


def _template_of(model: Model) -> str | None:
    change = model.tokenizer
    if change is not None and change.chat_template is not None:
        return change.chat_template
    folder = change.tokens.folder if change is not None and change.tokens else model.donor.folder
    return chat.read_template(folder)

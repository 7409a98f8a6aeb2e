"""Owns the prompts that starter recipes have in place of the user's own, and telling them apart."""

from __future__ import annotations

import re

_PLACEHOLDER = re.compile(
    r"A question for expert \d+, .*\?|Another text for expert \d+, as its users would write it\."
)


def placeholders(number: int, name: str) -> tuple[str, str]:
    """Return what stands where the prompts of an expert shall stand.

    Args:
        number: of the expert, from 1.
        name: what to call it.
    """
    return (
        f"A question for expert {number}, {name}?",
        f"Another text for expert {number}, as its users would write it.",
    )


def is_placeholder(text: str) -> bool:
    """Say whether a prompt is one of those, for whichever expert."""
    return _PLACEHOLDER.fullmatch(text) is not None

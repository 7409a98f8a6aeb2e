"""The room of starter recipes: writes one for the user's models out of a template of its kind.

The recipes in `recipes/` are made of the same templates, see `shelf`. Knows the words of recipes;
of models it reads how many layers they have, where a recipe needs that, and nothing else.
"""

from moeforge.starter.kinds import KINDS, Kind, unknown
from moeforge.starter.rendering import Answers, missing, render
from moeforge.starter.writing import SCHEMA_NAME, refuse_existing, write, write_schema

__all__ = [
    "KINDS",
    "SCHEMA_NAME",
    "Answers",
    "Kind",
    "missing",
    "refuse_existing",
    "render",
    "unknown",
    "write",
    "write_schema",
]

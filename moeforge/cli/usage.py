"""Owns what is said of a command that was typed wrong, and that streams take every character."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from moeforge.cli.shared import findings_json, print_json
from moeforge.errors import Finding

_PLAIN = "_TYPER_FORCE_DISABLE_TERMINAL"
"""Has typer print no control codes; on GitHub's machines it does even into files."""


_MISTAKE: Any = typer.BadParameter.__mro__[1]
"""UsageError: every mistake in what was typed. Not by its name, for typer brings its own click."""


class Commands(TyperGroup):
    """The commands; who asked for JSON gets his mistakes in JSON as well."""

    def invoke(self, ctx: Any) -> Any:
        """Do what was asked for."""
        words = [*getattr(ctx, "_protected_args", ()), *ctx.args]
        try:
            return super().invoke(ctx)
        except _MISTAKE as error:
            if "--json" in words:
                what = error.format_message()
                fix = f"{(error.ctx or ctx).command_path} --help says what there is."
                print_json({"errors": findings_json((Finding(what, fix),))})
            raise


def prepare_streams() -> None:
    """Let any text be printed whatever a terminal, a pipe or a file can show."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace" if stream is sys.stderr else "replace")
    if not sys.stdout.isatty() and "FORCE_COLOR" not in os.environ:
        os.environ.setdefault(_PLAIN, "1")

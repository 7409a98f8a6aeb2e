"""Owns the reference of the command line, made of the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def commands() -> str:
    """Return a section for each command, in the order in which `moeforge --help` lists them."""
    from typer.main import get_command

    from moeforge.cli import app

    sections = [_options("Options of every command", get_command(app).params)]
    for path, command in _leaves(get_command(app), "moeforge"):
        sections.append(_section(path, command))
    return "\n\n".join(sections)


def _leaves(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _leaves(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def _section(path: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    words = [_word(p) for p in arguments]
    needed = [f"{p.opts[-1]} {_word(p)}" for p in options if p.required]
    usage = " ".join([path, *words, *needed, "[OPTIONS]"])
    parts = [f"## `{path}`", " ".join((command.help or "").split()), f"```text\n{usage}\n```"]
    if arguments:
        rows = [f"| `{_word(p)}` | {_cell(p.help)} |" for p in arguments]
        parts.append("\n".join(["| argument | |", "|---|---|", *rows]))
    if options:
        parts.append(_table(options))
    return "\n\n".join(parts)


def _options(title: str, options: list[Any]) -> str:
    return f"## {title}\n\n{_table(options)}"


def _table(options: list[Any]) -> str:
    rows = [f"| {_flags(p)} | {_cell(p.help)} | {_default(p)} |" for p in options]
    return "\n".join(["| option | meaning | default |", "|---|---|---|", *rows])


def _word(parameter: Any) -> str:
    word = parameter.metavar or parameter.name.upper().replace("_", "-")
    several = parameter.nargs == -1 and "…" not in word
    return f"{word}…" if several else str(word)


def _flags(option: Any) -> str:
    value = "" if option.is_flag else f" {_word(option)}"
    spelled = [f"{name}{value}" for name in (*option.opts, *option.secondary_opts)]
    return ", ".join(f"`{name}`" for name in spelled)


def _default(option: Any) -> str:
    if option.required:
        return "required"
    # What depends on the case stands in the help text.
    plain = isinstance(option.default, (str, int, float)) and not isinstance(option.default, bool)
    return f"`{option.default}`" if plain else ""


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")

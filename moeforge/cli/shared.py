"""Owns what all commands share: options, messages, progress, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeforge.cli.unexpected import debugging, hidden, mistake, trace, translated
from moeforge.errors import BuildError, Finding, MoeforgeError
from moeforge.shown import show_size as show_size
from moeforge.system import open_file

if TYPE_CHECKING:
    from moeforge.forge import Progress, Result

RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="Recipe, a YAML file.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")]
Strict = Annotated[bool, typer.Option("--strict", help="Treat warnings as errors.")]
Out = Annotated[
    Path | None, typer.Option("-o", "--out", help="Output folder (default: the recipe's stem).")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Workers (default: all cores).")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Publish without checking the output.")]
Code = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that a model brings, from others.")
]
Private = Annotated[
    bool | None,
    typer.Option("--private/--public", help="For a new repository.", show_default=False),
]
Offline = Annotated[bool, typer.Option("--offline", help="Use only the local Hub cache.")]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return bytes for `5GB`, `900M`, `2GiB` or a plain number.

    Raises:
        typer.BadParameter: it is none of these, or zero.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise typer.BadParameter(f"{text!r} is not a size; write 5GB, 900MB, 2GiB")
    number, unit, binary = match.groups()
    power = " kmgt".index(unit.lower()) if unit else 0
    size = int(float(number) * (1024 if binary else 1000) ** power)
    if size < 1:
        raise typer.BadParameter("a size is at least one byte")
    return size


def print_parts(*parts: Any) -> None:
    """Print texts and tables."""
    from rich.console import Console

    console = Console(highlight=False)
    for part in parts:
        console.print(part)


def watched(*, as_json: bool) -> bool:
    """Say whether somebody looks on while a command runs."""
    return not as_json and sys.stderr.isatty()


def print_json(data: Any) -> None:
    """Print data as JSON."""
    print(json.dumps(data, indent=2))


def built_json(result: Result) -> dict[str, Any]:
    """Return what every build has to say of its model as plain data."""
    plan = result.plan
    return {
        "folder": str(result.folder),
        "kind": plan.kind,
        "parameters": plan.parameters,
        "active_parameters": plan.active_parameters,
        "bytes": plan.nbytes,
        "seconds": round(result.seconds, 3),
    }


def findings_json(findings: tuple[Finding, ...]) -> list[dict[str, Any]]:
    """Return findings as plain data."""
    return [finding.as_data() for finding in findings]


class _Terminated(KeyboardInterrupt):
    """SIGTERM: everything that ends well on Ctrl-C does on it."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Make SIGTERM end the block as Ctrl-C does, where signals can be received."""

    def end(number: int, frame: Any) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def reporting(*, as_json: bool = False) -> Iterator[None]:
    """Turn errors into messages and exit codes."""
    try:
        with _terminable():
            yield
    except MoeforgeError as error:
        raise _told(error, error.findings, error.exit_code, as_json=as_json) from None
    except KeyboardInterrupt as error:
        # Python ends by the signal, whatever exit code is asked for, if it came while code was made
        # of text, as dataclasses are; it forgets that when it runs other such code.
        exec("")
        what = "stopped; nothing was published"
        if as_json:
            print_json({"errors": findings_json((Finding(what),))})
        print(what, file=sys.stderr)
        _print_notes(error)
        raise typer.Exit(143 if isinstance(error, _Terminated) else 130) from None
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(open_file(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as error:
        known = translated(error)
        findings = known.findings if known else (mistake(error),)
        code = known.exit_code if known else MoeforgeError.exit_code
        raise _told(error, findings, code, as_json=as_json) from None


def _told(
    error: Exception, findings: tuple[Finding, ...], code: int, *, as_json: bool
) -> typer.Exit:
    """Print what is wrong; return the exit."""
    if debugging():
        print(trace(error), file=sys.stderr)
    if as_json:
        print(hidden(json.dumps({"errors": findings_json(findings)}, indent=2)))
    for finding in findings:
        print(hidden(f"error: {finding}"), file=sys.stderr)
    _print_notes(error)
    return typer.Exit(code)


def _print_notes(error: BaseException) -> None:
    """Print what was noted on an error on its way: what is kept of the work."""
    for text in getattr(error, "__notes__", ()):
        print(hidden(f"    {text}"), file=sys.stderr)


@contextmanager
def showing_progress(*, shown: bool) -> Iterator[Progress]:
    """Give a callback that draws one bar per phase; none where nobody looks."""
    if not shown:
        yield lambda phase, done, total: None
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description:<14}"),
        bars.BarColumn(),
        bars.TaskProgressColumn(),
        bars.TextColumn("{task.fields[amount]}"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True)) as display:
        tasks: dict[str, bars.TaskID] = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = display.add_task(phase, total=max(total, 1), amount="")
            amount = f"{done}/{total}"
            if phase in ("tensors", "download", "verify", "hash"):
                speed = display.tasks[tasks[phase]].speed or 0
                amount = f"{show_size(done)} of {show_size(total)}, {show_size(int(speed))}/s"
            finished = max(total, 1) if done >= total else done
            display.update(tasks[phase], completed=finished, amount=amount)

        yield show


def note(finding: Finding) -> None:
    """Print what is worth knowing."""
    print(f"{'warning' if finding.warning else 'note'}: {finding}", file=sys.stderr)


def check_device(device: str) -> None:
    """Refuse a device that torch cannot use.

    Raises:
        BuildError: with torch's reason.
    """
    if device == "cpu":
        return
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        what = f"--device {device} cannot be used: {reason}"
        raise BuildError(Finding(what, "Leave it out to use the CPU.")) from None

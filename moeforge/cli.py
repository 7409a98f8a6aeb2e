"""Owns the command line: the only file that prints or exits. Everything else is in `forge`."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeforge.errors import BuildError, Finding, MoeforgeError
from moeforge.version import __version__

if TYPE_CHECKING:
    from moeforge.forge import Progress, Result

app = typer.Typer(
    name="moeforge",
    help="Make one language model out of several: mixtures of experts, stacks and merges.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="Recipe, a YAML file.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
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


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


def _as_json(findings: tuple[Finding, ...]) -> list[dict[str, Any]]:
    return [
        {
            "what": f.what,
            "fix": f.fix,
            "path": list(f.path),
            "line": f.line or None,
            "warning": f.warning,
        }
        for f in findings
    ]


@contextmanager
def _reporting(*, as_json: bool = False) -> Iterator[None]:
    """Turn errors into messages and exit codes."""
    try:
        yield
    except MoeforgeError as error:
        if as_json:
            _print_json({"errors": _as_json(error.findings)})
        for finding in error.findings:
            print(f"error: {finding}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        print("stopped; nothing was published", file=sys.stderr)
        raise typer.Exit(130) from None
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None


@contextmanager
def _progress(*, shown: bool) -> Iterator[Progress]:
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
            if phase == "tensors":
                speed = display.tasks[tasks[phase]].speed or 0
                amount = f"{_bytes(done)} of {_bytes(total)}, {_bytes(int(speed))}/s"
            finished = max(total, 1) if done >= total else done
            display.update(tasks[phase], completed=finished, amount=amount)

        yield show


def _bytes(count: int) -> str:
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def _note(finding: Finding) -> None:
    print(f"{'warning' if finding.warning else 'note'}: {finding}", file=sys.stderr)


@app.command()
def build(
    recipe: RecipeArgument,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Output folder [default: the recipe's stem].")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Workers [default: all cores].")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Most memory to take, such as 2GB.")] = None,
    shard_size: Annotated[str, typer.Option(help="Most bytes per output file.")] = "5GB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing folder.")
    ] = False,
    offline: Offline = False,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Print what is done.")] = False,
) -> None:
    """Build the model of a recipe."""
    with _reporting(as_json=as_json):
        from moeforge import forge

        limit, per_file = parse_size(memory) if memory else None, parse_size(shard_size)
        _check_device(device)
        shown = not quiet and not as_json and sys.stderr.isatty()
        with _progress(shown=shown) as progress:
            result = forge.build(
                recipe,
                out,
                device=device,
                threads=threads,
                memory=limit,
                shard_size=per_file,
                overwrite=overwrite,
                offline=offline,
                progress=progress,
                note=_note if not quiet else lambda finding: None,
            )
        if as_json:
            _print_json(_result_json(result))
        elif not quiet:
            _show_result(result, verbose=verbose)


def _check_device(device: str) -> None:
    if device == "cpu":
        return
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        what = f"--device {device} cannot be used: {reason}"
        raise BuildError(Finding(what, "Leave it out to use the CPU.")) from None


def _result_json(result: Result) -> dict[str, Any]:
    plan, heldout = result.plan, result.heldout
    data: dict[str, Any] = {
        "folder": str(result.folder),
        "kind": plan.kind,
        "parameters": plan.parameters,
        "active_parameters": plan.active_parameters,
        "bytes": plan.nbytes,
        "seconds": round(result.seconds, 3),
    }
    if heldout:
        data["held_out"] = {
            "domains": heldout.domains,
            "tokens": heldout.tokens,
            "losses": heldout.losses,
            "experts": heldout.experts,
            "routing": heldout.routing,
        }
    return data


def _show_result(result: Result, *, verbose: bool) -> None:
    from rich.console import Console

    from moeforge.output.card import amount

    plan = result.plan
    console = Console(highlight=False)
    active = ""
    if plan.experts:
        active = f" ({amount(plan.active_parameters)} active)"
    console.print(
        f"[bold]{result.folder}[/]: {plan.config['architectures'][0]}, "
        f"{amount(plan.parameters)} parameters{active}, {_bytes(plan.nbytes)}, "
        f"made in {result.seconds:.1f} s",
        soft_wrap=True,
    )
    if verbose:
        copied = f"{_bytes(plan.bytes_copied)} copied as they are"
        console.print(f"{len(plan.tensors)} tensors, {_bytes(plan.bytes_read)} read, {copied}")
    if result.heldout:
        from moeforge.tables import heldout_tables

        for part in heldout_tables(result.heldout):
            console.print(part)


@app.command()
def check(
    recipe: RecipeArgument,
    target: Annotated[
        str | None,
        typer.Option(help="Engine to read the output: transformers4, vllm, llama.cpp or mlx."),
    ] = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Say what stands against building a recipe; reads no weights and writes nothing."""
    with _reporting(as_json=as_json):
        from moeforge import forge

        report = forge.check(recipe, target=target, offline=offline)
        if as_json:
            errors, notes = _as_json(report.errors), _as_json(report.notes)
            experts = report.plan.experts if report.plan else None
            homes = dict(experts.considered) if experts else {}
            _print_json({"errors": errors, "notes": notes, "architectures": homes})
        else:
            for finding in report.errors:
                print(f"error: {finding}", file=sys.stderr)
            for finding in report.notes:
                _note(finding)
            if report.plan and report.plan.experts:
                for name, why in report.plan.experts.considered:
                    print(f"architecture {name}: {why}")
            if not report.errors:
                print(f"{recipe}: fine; `moeforge plan {recipe}` says what would be made")
        raise typer.Exit(report.exit_code)


@app.command()
def plan(
    recipe: RecipeArgument,
    shard_size: Annotated[str, typer.Option(help="Most bytes per output file.")] = "5GB",
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Print what a build would make, read, write and need."""
    with _reporting(as_json=as_json):
        from moeforge import forge
        from moeforge.tables import describe, plan_table

        planned = forge.plan(recipe, offline=offline)
        described = describe(planned, parse_size(shard_size))
        if as_json:
            _print_json(described)
            return
        from rich.console import Console

        Console(highlight=False).print(plan_table(planned, described))


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint is, from its config and headers."""
    with _reporting(as_json=as_json):
        from moeforge.sources import open_source
        from moeforge.tables import facts, facts_table

        found = facts(open_source(model, revision, offline=offline))
        if as_json:
            _print_json(found)
            return
        from rich.console import Console

        Console(highlight=False).print(facts_table(found))


@app.command()
def show(
    shelf: Annotated[str, typer.Argument(help="methods, families or gates.")],
    as_json: Json = False,
) -> None:
    """List the merge methods, MoE families or gate modes."""
    with _reporting(as_json=as_json):
        from rich.console import Console

        from moeforge.errors import nearest
        from moeforge.tables import SHELVES, shelf_rows, shelf_table

        if shelf not in SHELVES:
            raise typer.BadParameter(
                f'"{shelf}"{nearest(shelf, SHELVES)} Known: {", ".join(SHELVES)}'
            )
        if as_json:
            _print_json(shelf_rows(shelf))
        else:
            Console(highlight=False).print(shelf_table(shelf))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A finished model folder.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="For a new repository.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    message: Annotated[str | None, typer.Option("-m", "--message", help="Commit message.")] = None,
) -> None:
    """Upload a model folder with its card to the Hugging Face Hub."""
    with _reporting():
        from moeforge.output.push import push as upload

        print(upload(folder, repo, private=private, revision=revision, message=message))


def _version(value: bool) -> None:
    if value:
        print(f"moeforge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    app()

"""Owns the commands about what was built: verify, rebuild, diff."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from moeforge.cli.shared import (
    Code,
    Json,
    NoVerify,
    Offline,
    Out,
    Overwrite,
    Threads,
    findings_json,
    note,
    print_json,
    print_parts,
    reporting,
    showing_progress,
    watched,
)
from moeforge.errors import BuildError, Finding


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model folder, whoever made it.")],
    forward: Annotated[
        bool | None,
        typer.Option(
            "--forward/--no-forward",
            help="Run it even if it has to be streamed from disk, or never "
            "(default: where its files can be mapped, or memory allows).",
            show_default=False,
        ),
    ] = None,
    code: Code = False,
    as_json: Json = False,
) -> None:
    """Check a model folder: files, values, hashes, config, loading, tokenizer, a forward pass."""
    with reporting(as_json=as_json):
        from moeforge.proof import verify as proof
        from moeforge.proof_tables import checks_json, checks_table

        with showing_progress(shown=watched(as_json=as_json)) as progress:
            found = proof.verify(
                folder,
                forward=forward,
                trust_remote_code=code,
                progress=lambda done, total: progress("verify", done, total),
            )
        if as_json:
            print_json(checks_json(found))
        else:
            print_parts(checks_table(found))
            for finding in found.notes:
                if finding.warning:
                    note(finding)
        for finding in found.errors:
            print(f"error: {finding}", file=sys.stderr)
        raise typer.Exit(0 if found.ok else BuildError.exit_code)


def rebuild(
    lock: Annotated[
        Path, typer.Argument(metavar="LOCK", help="moeforge.lock.json, or its folder.")
    ],
    out: Out = None,
    root: Annotated[
        Path, typer.Option("--root", help="Folder that the recipe lay in; its paths start there.")
    ] = Path(),
    threads: Threads = None,
    overwrite: Overwrite = False,
    offline: Offline = False,
    no_verify: NoVerify = False,
    as_json: Json = False,
) -> None:
    """Build again from a lock file, and say whether the bytes are the same."""
    with reporting(as_json=as_json):
        from moeforge.rebuilding import rebuild as again

        with showing_progress(shown=watched(as_json=as_json)) as progress:
            made = again(
                lock,
                out,
                root=root,
                threads=threads,
                overwrite=overwrite,
                offline=offline,
                verify=not no_verify,
                progress=progress,
                note=note,
            )
        fix = "No recorded input has changed; other versions may round otherwise."
        if made.unsure:
            fix = f"Only a sample was compared of {', '.join(made.unsure)}; --hash-inputs of "
            fix += "`moeforge build` records them whole."
        findings = tuple(
            Finding(
                f"{name} has other bytes than {lock} says",
                fix if name == made.differing[-1] else "",
            )
            for name in made.differing
        )
        if as_json:
            print_json(
                {
                    "folder": str(made.result.folder),
                    "same": made.same,
                    "differing": list(made.differing),
                    "unsure": list(made.unsure),
                    "versions": {name: list(pair) for name, pair in made.versions.items()},
                    "errors": findings_json(findings),
                }
            )
        elif made.same:
            print(f"{made.result.folder}: every file has the same bytes as in {lock}")
        for finding in findings:
            print(f"error: {finding}", file=sys.stderr)
        raise typer.Exit(0 if made.same else BuildError.exit_code)


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder or Hub id.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Folder or Hub id.")],
    png: Annotated[
        Path | None, typer.Option("--png", help="Heat map to draw: layers and kinds of tensors.")
    ] = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Compare two models tensor by tensor; exit code 0 where they are the same, 1 where not."""
    with reporting(as_json=as_json):
        from moeforge.proof import diff as proof
        from moeforge.proof_tables import diff_json, diff_tables

        with showing_progress(shown=watched(as_json=as_json)) as progress:
            found = proof.diff(
                a, b, offline=offline, progress=lambda done, total: progress("tensors", done, total)
            )
        if png:
            from moeforge.proof.diff_map import draw

            draw(found, png)
        if as_json:
            print_json(diff_json(found))
        else:
            print_parts(*diff_tables(found))
        raise typer.Exit(0 if found.same else 1)

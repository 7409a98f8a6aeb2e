"""Owns the command that sends models to the Hub: push."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeforge.cli.shared import (
    Json,
    Private,
    note,
    print_json,
    print_parts,
    reporting,
    show_size,
    showing_progress,
    watched,
)
from moeforge.errors import Finding, MoeforgeError

if TYPE_CHECKING:
    from moeforge.publishing import Prepared, Pushed


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A finished model folder.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub.")],
    private: Private = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    message: Annotated[str | None, typer.Option("-m", "--message", help="Commit message.")] = None,
    pr: Annotated[
        bool, typer.Option("--pr", help="Open a pull request instead of changing the branch.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be sent; change nothing.")
    ] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Leave out the checks; the lock file still counts.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Upload a model folder with its card to the Hugging Face Hub, as one commit."""
    with reporting(as_json=as_json):
        from moeforge import publishing

        shown = watched(as_json=as_json)
        with showing_progress(shown=shown) as progress:
            ready = publishing.prepared(
                folder,
                repo,
                private=private,
                revision=revision,
                pr=pr,
                verify=not no_verify,
                anonymous=dry_run,
                progress=progress,
            )
        if not dry_run:
            with _noting("what was sent is not sent again: the same command goes on"):
                made = publishing.carry_out(ready, message=message, shown=shown)
            if as_json:
                print_json(made.as_data())
            else:
                if not (ready.state.add or ready.state.remove):
                    note(Finding(f"{repo} has all of it already: no commit was made"))
                print(made.url)
            return
        if as_json:
            print_json(ready.as_data())
        else:
            _show(ready)
        if not ready.access.token:
            what = "there is no token, and without one nothing can be pushed"
            note(Finding(what, "Log in with `hf auth login`, or set HF_TOKEN.", warning=True))


def refuse_push(repo: str | None, *, private: bool | None, no_verify: bool, offline: bool) -> None:
    """Refuse a push after a build that could not be made; `repo` is None where none is asked for.

    Raises:
        HubError: the Hub would refuse it.
        typer.BadParameter: the options contradict each other.
    """
    if repo is None:
        if private is not None:
            raise typer.BadParameter("--private and --public say how to --push; add --push REPO")
        return
    if no_verify:
        what = "--push sends only what has passed its checks; leave out --no-verify, or use "
        raise typer.BadParameter(f"{what}`moeforge push --no-verify` afterwards")
    if offline:
        raise typer.BadParameter("--push needs the Hub; leave out --offline, or push afterwards")
    from moeforge.publishing import check_access

    check_access(repo, private=private)


def pushed(folder: Path, repo: str, private: bool | None, *, shown: bool) -> Pushed:
    """Push what was just built; where that fails, say that the folder is there and what goes on.

    Raises:
        HubError: the Hub refused or could not be reached.
    """
    from moeforge import publishing

    said = f"the model is finished, in {folder}; to push it: "
    said += publishing.command(folder, repo, private)
    try:
        with _noting(said):
            with showing_progress(shown=shown) as progress:
                ready = publishing.prepared(
                    folder, repo, private=private, verify=False, progress=progress
                )
            return publishing.carry_out(ready, shown=shown)
    except MoeforgeError as error:
        raise type(error)(*error.findings, said) from error


@contextmanager
def _noting(said: str) -> Iterator[None]:
    """Say something where somebody stops what is in the block."""
    try:
        yield
    except KeyboardInterrupt as error:
        # The attribute behind add_note(), which Python 3.10 does not have.
        error.__notes__ = [*getattr(error, "__notes__", ()), said]  # type: ignore[attr-defined]
        raise


def _show(ready: Prepared) -> None:
    """Print what a push would do."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("file")
    table.add_column("size", justify="right")
    table.add_column("what would be done")
    for group, word in ((ready.state.add, "sent"), (ready.state.same, "there already")):
        for file in group:
            table.add_row(escape(file.name), show_size(file.nbytes), word)
    for name in ready.state.remove:
        table.add_row(escape(name), "", "removed: it is of an earlier model")
    access, branch = ready.access, ready.revision or "main"
    kind = {True: "private", False: "public", None: "with your account's visibility"}
    made = "" if access.exists else f" The repository would be made, {kind[access.private]}."
    where = f"a pull request to {branch}" if ready.pr else f"the branch {branch}"
    if not (ready.state.add or ready.state.remove):
        print_parts(table, escape(f"{access.repo_id} has all of it, on the branch {branch}."))
        return
    count = len(ready.state.add)
    files = "1 file" if count == 1 else f"{count} files"
    line = f"{files}, {show_size(ready.nbytes)}, would go to {where} of {access.repo_id}.{made}"
    print_parts(table, escape(f"{line} Nothing was sent."))

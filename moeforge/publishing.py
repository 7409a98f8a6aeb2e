"""Owns what has to be true before a model goes to the Hub: it is whole and passes its checks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moeforge.errors import Finding, SourceError
from moeforge.output import push as hub
from moeforge.output.push import Prepared, Pushed, carry_out, command
from moeforge.output.push_access import check_access
from moeforge.proof.verify import verify as verified

__all__ = ["Prepared", "Pushed", "carry_out", "check_access", "command", "prepared", "push"]

Progress = Callable[[str, int, int], None]


def prepared(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    pr: bool = False,
    verify: bool = True,
    anonymous: bool = False,
    progress: Progress = lambda phase, done, total: None,
) -> Prepared:
    """Find out what a push would do, and refuse what must not be pushed; send nothing.

    Args:
        folder: complete checkpoint with config.json, safetensors weights and README.md.
        repo_id: `owner/name`, or `name` for your own.
        private: visibility that the repository must have; None leaves it as it is, or as your
            account's default.
        revision: branch to upload to; main if None.
        pr: prepare a pull request.
        verify: check the model as `moeforge verify` does; its lock file is held against it anyway.
        anonymous: go on without a token.
        progress: told the phase ("verify", "hash") and bytes.

    Raises:
        SourceError: the folder is not complete, fails a check, or is not what its lock file says.
        HubError: the push would be refused, or the Hub cannot be reached.
    """
    folder = Path(folder)
    hub.refuse_incomplete(folder)
    access = check_access(repo_id, private=private, pr=pr, anonymous=anonymous)
    if verify:
        found = verified(folder, progress=lambda done, total: progress("verify", done, total))
        if not found.ok:
            what = f"{folder} does not pass its checks; nothing was sent"
            fix = f"`moeforge verify {folder}` shows all of them; --no-verify leaves them out, but "
            fix += "for the lock file's."
            raise SourceError(*found.errors, Finding(what, fix))
    return hub.prepare(
        folder,
        access,
        revision=revision,
        pr=pr,
        progress=lambda done, total: progress("hash", done, total),
    )


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    pr: bool = False,
    verify: bool = True,
    progress: Progress = lambda phase, done, total: None,
) -> Pushed:
    """Upload a model folder that passes its checks as one commit of a model repository.

    The repository and the branch are created where they do not exist. What is already there is not
    sent again, so a push that broke is made again with the same call.

    Args:
        folder: complete checkpoint with config.json, safetensors weights and README.md.
        repo_id: `owner/name`, or `name` for your own.
        private: visibility that the repository must have; None leaves it as it is, or as your
            account's default.
        revision: branch to upload to; main if None.
        message: first line of the commit.
        pr: open a pull request instead of changing the branch.
        verify: check the model as `moeforge verify` does; its lock file is held against it anyway.
        progress: told the phase ("verify", "hash") and bytes; what is sent, huggingface_hub shows.

    Raises:
        SourceError: the folder is not complete, fails a check, or is not what its lock file says;
            nothing was sent.
        HubError: the Hub refused or could not be reached.
    """
    ready = prepared(
        folder,
        repo_id,
        private=private,
        revision=revision,
        pr=pr,
        verify=verify,
        progress=progress,
    )
    return carry_out(ready, message=message, shown=True)

"""Owns making one commit of files: which storage takes them, and what is tried again.

Files that the Hub's storage has are not sent again, so a push that broke goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from moeforge.output.push_access import ask

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

_TRIES = 4
"""Times that a commit is asked for; huggingface_hub itself tries everything else again."""
_CHANGED = (409, 412)
_PASSING = (429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Local:
    """A file that is to be in the repository.

    Attributes:
        name: its path in the folder and in the repository.
        path: where it lies.
        nbytes: its size.
        sha256: of all its bytes, in hexadecimal.
    """

    name: str
    path: Path
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class State:
    """A folder compared with a commit of the repository.

    Attributes:
        head: the commit.
        add: files that it lacks, or has with other bytes.
        same: files that it has.
        remove: what it has of an earlier model and this folder does not.
    """

    head: str | None
    add: tuple[Local, ...]
    same: tuple[Local, ...]
    remove: tuple[str, ...]


def send(
    api: HfApi,
    repo_id: str,
    state: State,
    compared: Callable[[], State],
    *,
    revision: str | None,
    message: str,
    pr: bool,
) -> CommitInfo | None:
    """Upload what `state` says, and make one commit of it.

    Args:
        api: the client.
        repo_id: `owner/name`.
        state: what is to be done.
        compared: compares once more, when the branch has moved or an answer was lost.
        revision: branch; main if None.
        message: first line of the commit.
        pr: make a pull request of it.

    Returns:
        The commit; None if it turned out to be there.

    Raises:
        Exception: whatever huggingface_hub raises when it has given up.
    """
    from huggingface_hub import CommitOperationDelete

    with ExitStack() as files:
        whole = _takes_paths(api, repo_id, revision, pr=pr)
        additions: dict[Local, Any] = {}
        for attempt in range(1, _TRIES + 1):
            for file in state.add:
                if file not in additions:
                    additions[file] = _addition(file, None if whole else files)
            try:
                return api.create_commit(
                    repo_id,
                    [
                        *(CommitOperationDelete(name) for name in state.remove),
                        *(additions[file] for file in state.add),
                    ],
                    commit_message=message,
                    revision=revision,
                    parent_commit=state.head,
                    create_pr=pr,
                    num_threads=2,  # a file that breaks off is sent again: few at a time
                )
            except Exception as error:
                if attempt == _TRIES or not _worth_another(error, pr=pr):
                    raise
                time.sleep(2**attempt)
                state = compared()
                if not (state.add or state.remove):
                    return None
    raise AssertionError("the last attempt returns or raises")


def _worth_another(error: Exception, *, pr: bool) -> bool:
    """Say whether asking for a commit that failed with `error` once more is safe and may help.

    Asking for a pull request again is neither where the answer may only have been lost: there
    would be two.
    """
    from huggingface_hub import errors

    asked: Any = getattr(error, "response", error)
    try:
        url = str(asked.request.url)
    except (AttributeError, RuntimeError):  # it is none of a request
        return False
    if "/commit/" not in url:
        return False
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        return status in _CHANGED or (status in _PASSING and not pr)
    return not pr


def _addition(file: Local, files: ExitStack | None) -> Any:
    """Return the operation that adds `file`, whose hash is known.

    Args:
        file: what is added.
        files: closes the opened file in whose form the client sends it by LFS and not by Xet; None
            leaves the choice to the client.
    """
    from huggingface_hub import CommitOperationAdd

    addition = CommitOperationAdd(file.name, file.path)
    # What is committed is what was hashed, and the client need not read it for that once more.
    addition.upload_info.sha256 = bytes.fromhex(file.sha256)
    if files:
        addition.path_or_fileobj = files.enter_context(file.path.open("rb"))
    return addition


def _takes_paths(api: HfApi, repo_id: str, revision: str | None, *, pr: bool) -> bool:
    """Say whether the client may choose: it takes Xet wherever it can, and not all servers do."""
    from huggingface_hub import constants

    if constants.HF_HUB_DISABLE_XET or find_spec("hf_xet") is None:
        return True
    branch = quote(revision or constants.DEFAULT_REVISION, safe="")
    asked = {"create_pr": "1"} if pr else {}
    return ask(api, f"models/{repo_id}/xet-write-token/{branch}", **asked) != 404


@contextmanager
def bars(*, shown: bool) -> Iterator[None]:
    """Keep huggingface_hub from drawing, unless its bars, in bytes, are wanted."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, but no __all__
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def sizes(files: Sequence[Local]) -> list[dict[str, Any]]:
    """Return names and bytes as plain data."""
    return [{"path": file.name, "bytes": file.nbytes} for file in files]

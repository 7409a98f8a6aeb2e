"""Owns sending a finished checkpoint folder to the Hugging Face Hub, as one commit.

Knows nothing of how the folder was made; its lock file, if there is one, has to be true of it.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeforge import hashes
from moeforge.errors import Finding, HubError, SourceError
from moeforge.output.lock import NAME as LOCK
from moeforge.output.locked import differences, locked_files
from moeforge.output.push_access import Access, client
from moeforge.output.push_send import Local, State, bars, send, sizes
from moeforge.sources.folder import INDEX, SINGLE, FolderSource
from moeforge.sources.hub import explain

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_REPLACED = (SINGLE, INDEX, "model-*.safetensors", "moeforge.*")
"""Files of an earlier model that would be wrong of this one: transformers would prefer an old
model.safetensors to new shards."""


@dataclass(frozen=True)
class Prepared:
    """A push that can be made: what would go where.

    Attributes:
        access: the repository.
        revision: branch; main if None.
        pr: whether it would be a pull request.
        state: what would be sent, and what is there already.
        files: all files of the folder that belong to the model.
    """

    access: Access
    revision: str | None
    pr: bool
    state: State
    files: tuple[Local, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the files that the repository lacks."""
        return sum(file.nbytes for file in self.state.add)

    def as_data(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "repo": self.access.repo_id,
            "exists": self.access.exists,
            "private": self.access.private,
            "token": self.access.token,
            "revision": self.revision or "main",
            "bytes": self.nbytes,
            "upload": sizes(self.state.add),
            "unchanged": sizes(self.state.same),
            "remove": list(self.state.remove),
        }


@dataclass(frozen=True)
class Pushed:
    """A push that was made.

    Attributes:
        url: page of the model, of its branch, or of the pull request.
        commit: what was made of it; None where there was nothing to do.
        prepared: what was sent.
    """

    url: str
    commit: str | None
    prepared: Prepared

    def as_data(self) -> dict[str, Any]:
        """Return it as plain data: what was to be done, and what became of it."""
        opened = self.prepared.pr and self.commit is not None
        return {
            **self.prepared.as_data(),
            "url": self.url,
            "commit": self.commit,
            "pull_request": self.url if opened else None,
        }


def refuse_incomplete(folder: Path) -> None:
    """Refuse what is no complete checkpoint with a model card.

    Raises:
        SourceError: with what is missing.
    """
    if not folder.exists():
        raise SourceError(Finding(f"{folder} does not exist", "Give a folder with a model in it."))
    FolderSource(str(folder), folder).specs()
    if not (folder / "README.md").is_file():
        what = f"{folder} has no README.md, which is the model card on the Hub"
        raise SourceError(Finding(what, "Write one; `moeforge build` does."))


def prepare(
    folder: Path,
    access: Access,
    *,
    revision: str | None = None,
    pr: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Prepared:
    """Hash a folder, hold it against its lock file, and compare it with the repository.

    Args:
        folder: complete checkpoint.
        access: the repository, from `check_access`.
        revision: branch; main if None.
        pr: prepare a pull request.
        progress: told bytes that were hashed, and all of them.

    Raises:
        SourceError: it is not what its lock file says.
        HubError: the Hub refused or could not be reached.
    """
    files = _read(folder, progress)
    try:
        state = _compare(client(), access, revision, files)
    except Exception as error:  # huggingface_hub raises its own, its HTTP library's and others
        raise explain(error, f"pushing to {access.repo_id}") from error
    return Prepared(access, revision, pr, state, files)


def carry_out(prepared: Prepared, *, message: str | None = None, shown: bool = False) -> Pushed:
    """Make the push: repository and branch where they do not exist, the files, one commit.

    Args:
        prepared: what is to be sent.
        message: first line of the commit.
        shown: let huggingface_hub draw what is sent, where somebody looks on.

    Raises:
        HubError: the Hub refused or could not be reached; what was sent need not be sent again.
    """
    access, revision, pr = prepared.access, prepared.revision, prepared.pr
    api, state = client(), prepared.state
    repo_id, url = access.repo_id, f"{api.endpoint}/{access.repo_id}"
    if revision:
        url += f"/tree/{revision}"
    commit = None

    def compared() -> State:
        there = Access(repo_id, exists=True, private=access.private)
        return _compare(api, there, revision, prepared.files)

    try:
        if not access.exists:
            api.create_repo(repo_id, private=access.private, exist_ok=True)
        if revision and not pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if not access.exists:
            state = compared()
        if state.add or state.remove:
            with bars(shown=shown):
                made = send(
                    api,
                    repo_id,
                    state,
                    compared,
                    revision=revision,
                    message=message or "Upload with moeforge",
                    pr=pr,
                )
            if made:
                url, commit = made.pr_url or url, made.oid
    except Exception as error:
        told = explain(error, f"pushing to {repo_id}")
        if pr:
            look = f"See first whether it was made after all: {api.endpoint}/{repo_id}/discussions"
            told = HubError(*told.findings, Finding("the pull request was not confirmed", look))
        raise told from error
    return Pushed(url, commit, prepared)


def command(folder: Path, repo_id: str, private: bool | None) -> str:
    """Return the command that makes a push, for messages."""
    flag = {True: ["--private"], False: ["--public"], None: []}[private]
    return shlex.join(["moeforge", "push", str(folder), repo_id, *flag])


def _read(folder: Path, progress: Callable[[int, int], None]) -> tuple[Local, ...]:
    """Return the files of a model folder with their hashes; hidden ones are none of it.

    Raises:
        SourceError: the lock file says otherwise.
    """
    paths = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not _is_private(path.relative_to(folder))
    }
    locked = locked_files(folder)
    # What can be seen without reading is seen first.
    if wrong := differences(folder, locked, {}):
        raise _changed(folder, wrong)
    done, total = 0, sum(path.stat().st_size for path in paths.values())

    def told(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    # The Hub names files by SHA-256; the lock's hash comes of the same read.
    kinds = {hashes.SHA256, locked.kind} if locked.files else {hashes.SHA256}
    found = {name: hashes.digests(path, kinds, told) for name, path in paths.items()}
    if locked.files:
        ours = {name: digests[locked.kind] for name, digests in found.items()}
        if wrong := differences(folder, locked, ours):
            raise _changed(folder, wrong)
    return tuple(
        Local(name, path, path.stat().st_size, found[name][hashes.SHA256])
        for name, path in paths.items()
    )


def _is_private(path: Path) -> bool:
    """Say whether a file is of some tool and not of the model: .git, .cache, .env, __pycache__."""
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _changed(folder: Path, wrong: list[Finding]) -> SourceError:
    what = f"{folder} is not what {LOCK} says; nothing was sent"
    fix = f"Build it again; or, if the change is meant, remove {LOCK} from it."
    return SourceError(*wrong, Finding(what, fix))


def _compare(api: HfApi, access: Access, revision: str | None, files: tuple[Local, ...]) -> State:
    """Compare files with the branch as it is now; a branch that is not there starts as main."""
    from huggingface_hub.errors import RevisionNotFoundError

    if not access.exists:
        return State(None, files, (), ())
    try:
        head = api.model_info(access.repo_id, revision=revision).sha
    except RevisionNotFoundError:
        head = api.model_info(access.repo_id).sha
    tree = api.list_repo_tree(access.repo_id, recursive=True, revision=head)
    there = {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}
    names = {file.name for file in files}
    same = tuple(file for file in files if _equals(file, there.get(file.name)))
    return State(
        head,
        tuple(file for file in files if file not in same),
        same,
        tuple(name for name in sorted(there) if name not in names and _is_replaced(name)),
    )


def _is_replaced(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in _REPLACED)


def _equals(file: Local, entry: Any) -> bool:
    """Say whether an entry of the repository's tree has the bytes of `file`."""
    if entry is None or entry.size != file.nbytes:
        return False
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == file.sha256)
    data = file.path.read_bytes()  # git keeps small files only
    return bool(entry.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())

"""Owns reading checkpoints: the `Source` seam, and opening whatever a recipe names.

Knows bytes, headers and config.json; knows nothing of layers, merges or torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from moeforge.errors import Finding, HubError, SourceError, nearest
from moeforge.tensors import TensorSpec
from moeforge.texts import expanded


@dataclass(frozen=True)
class FileSpan:
    """Bytes [offset, offset + nbytes) of a file."""

    path: Path
    offset: int
    nbytes: int


class Source(Protocol):
    """A checkpoint, however it is stored.

    Attributes:
        key: name that is unique within a plan.
        config: the raw config.json.
        folder: where its tokenizer and other small files lie; None where there are none.
    """

    @property
    def key(self) -> str:
        """Its name."""

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json."""

    @property
    def folder(self) -> Path | None:
        """Its folder."""

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return dtype and shape of every tensor, from headers only."""

    def locate(self, name: str) -> FileSpan | None:
        """Return where the raw bytes of tensor `name` lie, if they lie on disk as they are."""

    def read(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with the raw bytes of tensor `name` from byte `start` on."""


class Fetched(Source, Protocol):
    """A source whose weights files come one by one, when they are wanted."""

    def file_of(self, name: str) -> str:
        """Return the file that holds tensor `name`."""

    def span(self, name: str) -> FileSpan:
        """Return where the bytes of tensor `name` lie, or will lie; fetches nothing."""

    def size_of(self, file: str) -> int:
        """Return the bytes of a file."""

    def sha256_of(self, file: str) -> str:
        """Return the SHA-256 of a file; one that is known without reading it, where there is."""

    def has(self, file: str) -> bool:
        """Say whether a file is here."""

    def fetch(self, file: str, progress: Callable[[int], None] = lambda count: None) -> None:
        """Bring a file; `progress` is told of the bytes as they come."""

    def evict(self, file: str) -> None:
        """Remove a file if this source has brought it."""

    def close(self, keep: Collection[str]) -> None:
        """Close all files but `keep`."""


def streamed(source: Source) -> Fetched | None:
    """Return `source` if its weights come file by file, else None."""
    return cast(Fetched, source) if getattr(source, "streams", False) else None


def lies(source: Source, name: str) -> FileSpan | None:
    """Return where the raw bytes of a tensor lie or will lie as they are; fetches nothing."""
    coming = streamed(source)
    return coming.span(name) if coming else source.locate(name)


_HUB_URL = re.compile(r"https?://huggingface\.co/([\w.-]+/[\w.-]+)")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def open_source(
    model: str,
    revision: str | None = None,
    subfolder: str | None = None,
    *,
    beside: Path = Path(),
    offline: bool = False,
    commit: str | None = None,
) -> Source:
    """Open a checkpoint by path or Hub id.

    Args:
        model: a path, looked up in `beside` and then in the working directory, or a Hub id.
        revision: branch, tag or commit; Hub only.
        subfolder: folder below it that holds config.json.
        beside: folder of the recipe.
        offline: use only what is in the local Hub cache.
        commit: what the revision stands for; None asks the Hub.

    Raises:
        SourceError: it is neither, or is not a usable checkpoint.
        HubError: the Hub refused or could not be reached.
    """
    from moeforge.sources.folder import FolderSource

    def local(folder: Path) -> Source:
        key = f"{model}/{subfolder}" if subfolder else model
        return FolderSource(key, folder / subfolder if subfolder else folder)

    def remote() -> Source:
        from moeforge.sources.hub import HubSource

        return HubSource(model, revision, subfolder, offline=offline, commit=commit)

    return find(model, revision, beside, local, remote)


Found = TypeVar("Found")


def find(
    name: str,
    revision: str | None,
    beside: Path,
    local: Callable[[Path], Found],
    remote: Callable[[], Found],
    kind: str = "",
) -> Found:
    """Open what a recipe names: a path where there is one, else a Hub id.

    Args:
        name: as the recipe has it.
        revision: Hub only.
        beside: folder of the recipe, where a path is looked up before the working directory.
        local: opens a folder of this machine.
        remote: opens the repository `name`.
        kind: word before the name in messages, with a space behind it.

    Raises:
        SourceError: it is neither.
        HubError: `remote` raised it, and the name does not look like a misspelt path.
    """
    for candidate in (beside / expanded(name), expanded(name)):
        if candidate.exists():
            if revision:
                what = f"{name} is a local folder and has no revision {revision}"
                raise SourceError(Finding(what, "Remove the revision, or give a Hub id."))
            return local(candidate)
    if not _HUB_ID.fullmatch(name):
        looked = " and ".join(str(p) for p in dict.fromkeys((beside.resolve(), Path.cwd())))
        what = f"{kind}{name} does not exist (looked in {looked}), and it is not a Hub id"
        url = _HUB_URL.match(name)
        fix = f"Write {url[1]}." if url else "Correct the path."
        raise SourceError(Finding(what, fix))
    try:
        return remote()
    except HubError as error:
        # What looks like owner/name may be a misspelt path: say so where its folder is here.
        folder, _, last = name.rpartition("/")
        if not folder:
            places = [place for place in (beside, Path()) if place.is_dir()]
            here = {item.name for place in places for item in place.iterdir()}
            also = f"; and no folder {name} is here{nearest(name, here)}"
            raise HubError(*(replace(f, what=f.what + also) for f in error.findings)) from error
        around = [place / folder for place in (beside, Path()) if folder]
        entries = {item.name for place in around if place.is_dir() for item in place.iterdir()}
        if not entries:
            raise
        what = f"{kind}{name} does not exist: {folder} is here, but has no {last}"
        hub = " ".join(finding.what for finding in error.findings)
        fix = f"Correct the path. As a Hub id: {hub}."
        raise SourceError(Finding(what + nearest(last, entries), fix)) from error

"""Owns checkpoints on the Hugging Face Hub: headers first, weights only when they are read.

Everything goes through huggingface_hub: its cache, its token, its offline mode (HF_HUB_OFFLINE).
"""

from __future__ import annotations

import glob
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from moeforge.errors import Finding, HubError, SourceError
from moeforge.hashes import sha256
from moeforge.sources import FileSpan, pickled
from moeforge.sources.files import TensorFiles
from moeforge.sources.folder import (
    SINGLE,
    WEIGHTS,
    FolderSource,
    module_folders,
    read_index,
    read_json,
    refuse_unusable,
    weights_file,
)
from moeforge.sources.header import MAX_HEADER, Entry, parse_header
from moeforge.sources.hub_errors import explain
from moeforge.tensors import TensorSpec

__all__ = ["HubSource", "explain"]

_SMALL = (
    *("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"),
    *("LICENSE*", "NOTICE*", "README.md"),
)
_CONNECTIONS = 8
"""Headers that are fetched at the same time."""


class HubSource:
    """A checkpoint repository on the Hub.

    Opening it fetches small files, `specs` fetches headers, `locate` and `read` fetch weights, file
    by file.

    Args:
        repo_id: `owner/name`.
        revision: branch, tag or commit; the default branch if None.
        subfolder: folder of the repository that holds config.json.
        offline: look only into the local cache; HF_HUB_OFFLINE=1 does the same.
        commit: what the revision stands for; None asks the Hub.

    Attributes:
        commit: what the revision stood for when it was opened; all reading is of this commit.

    Raises:
        HubError: the Hub refused or could not be reached, or offline it is not in the cache.
        SourceError: the repository is not a usable checkpoint.
    """

    def __init__(
        self,
        repo_id: str,
        revision: str | None,
        subfolder: str | None,
        *,
        offline: bool,
        commit: str | None = None,
    ) -> None:
        from huggingface_hub import constants

        self.repo_id = repo_id
        at = f"@{revision}" if revision else ""
        self.key = "/".join(filter(None, (repo_id, subfolder))) + at
        inner = PurePosixPath(subfolder or ".")
        if inner.is_absolute() or ".." in inner.parts:
            what = f"{subfolder} is not a folder inside {repo_id}"
            raise SourceError(Finding(what, "Give the subfolder relative to the repository."))
        self._prefix = "".join(f"{part}/" for part in inner.parts)
        self._offline = offline or constants.HF_HUB_OFFLINE
        self._lock = threading.Lock()
        self._downloaded: FolderSource | None = None
        self._brought: set[str] = set()
        self._digests: dict[str, str] = {}
        # Other programs also fill the cache, so offline not all small files can be asked for.
        snapshot = self._fetch_files(
            ("config.json",) if self._offline else _SMALL, commit or revision
        )
        self.commit = snapshot.name
        self.folder: Path = snapshot / self._prefix
        config_file = self.folder / "config.json"
        config = read_json(config_file) if config_file.exists() else None
        self._sizes = self._cached_sizes() if self._offline else self._listed_sizes()
        refuse_unusable(self.key, set(self._sizes), config, self.folder)
        if (modules := module_folders(self.folder)) and not self._offline:
            self._fetch_files([f"{glob.escape(name)}/*" for name in modules], self.commit, ())
        self.config: dict[str, Any] = config or {}
        self._weights = weights_file(self._sizes) or ""

    def _fetch_files(
        self, patterns: Iterable[str], revision: str | None, ignore: Iterable[str] = ("*/*",)
    ) -> Path:
        """Put matching files into the cache; return the snapshot's folder.

        Args:
            patterns: relative to the folder of config.json; a star also matches slashes.
            revision: branch, tag or commit.
            ignore: what not to fetch; unless told otherwise, what lies in folders below.
        """
        from huggingface_hub import snapshot_download

        prefix = glob.escape(self._prefix)
        try:
            path = snapshot_download(
                self.repo_id,
                revision=revision,
                allow_patterns=[prefix + pattern for pattern in patterns],
                ignore_patterns=[prefix + pattern for pattern in ignore],
                local_files_only=self._offline,
            )
        except Exception as error:  # huggingface_hub raises its own, its HTTP library's and others
            raise explain(error, self.key) from error
        return Path(path)

    def _listed_sizes(self) -> dict[str, int]:
        """Return name and bytes of every file beside config.json, as the Hub lists them."""
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        folder = self._prefix.rstrip("/") or None
        try:
            entries = HfApi().list_repo_tree(self.repo_id, folder, revision=self.commit)
            files = [entry for entry in entries if isinstance(entry, RepoFile)]
        except Exception as error:
            raise explain(error, self.key) from error
        for file in files:
            if file.lfs is not None:
                self._digests[file.path.removeprefix(self._prefix)] = file.lfs.sha256
        return {file.path.removeprefix(self._prefix): file.size for file in files}

    def _cached_sizes(self) -> dict[str, int]:
        """Return name and bytes of every cached file beside config.json.

        Where no index is among them, a single weights file is assumed: whether it really is there
        shows when it is asked for.
        """
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        sizes = {file.name: file.stat().st_size for file in found if file.is_file()}
        return sizes if weights_file(sizes) else {SINGLE: 0, **sizes}

    @cached_property
    def _index(self) -> dict[str, str]:
        """Weights file of each tensor; empty where there is a single file."""
        if self._weights in (SINGLE, pickled.SINGLE):
            return {}
        weight_map = read_index(self.key, self.folder / self._weights)
        absent = sorted(set(weight_map.values()) - set(self._sizes))
        if absent and not self._offline:
            what = f"{self.key}: {self._weights} names {absent[0]}, which the repository lacks"
            raise SourceError(Finding(what, "Use another revision, or tell the author."))
        return weight_map

    @property
    def _weight_files(self) -> list[str]:
        return sorted(set(self._index.values())) or [self._weights]

    @property
    def _missing(self) -> list[str]:
        """Weights files that are not in the local cache."""
        return [file for file in self._weight_files if not (self.folder / file).exists()]

    @property
    def _local(self) -> FolderSource:
        """The whole checkpoint in the local cache; downloads what is missing."""
        with self._lock:
            if self._downloaded is None:
                missing = self._missing
                if missing and self._offline:
                    what = f"{self.key}: offline mode is on, and {missing[0]} is not in the cache"
                    fix = f"Go online once, or fetch it with `hf download {self.repo_id}`."
                    raise HubError(Finding(what, fix))
                if missing:
                    self._fetch_files(map(glob.escape, missing), self.commit)
                self._downloaded = FolderSource(self.key, self.folder)
            return self._downloaded

    def _fetch_range(self, file: str, start: int, count: int) -> bytes:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, but no __all__
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        url = hf_hub_url(self.repo_id, self._prefix + file, revision=self.commit)
        wanted = {"Range": f"bytes={start}-{start + count - 1}", "Accept-Encoding": "identity"}
        headers = {**build_hf_headers(), **wanted}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            with http_stream_backoff("GET", url, headers=headers, timeout=timeout) as response:
                hf_raise_for_status(response)
                # A server without ranges answers 200 from byte 0 on: hang up when it is enough.
                skip = start if response.status_code == 200 else 0
                data = bytearray()
                for chunk in response.iter_bytes():
                    data += chunk
                    if len(data) >= skip + count:
                        break
        except Exception as error:
            raise explain(error, f"{self.key}, header of {file}") from error
        return bytes(data[skip : skip + count])

    def _remote_header(self, file: str) -> dict[str, Entry]:
        size = self._sizes[file]
        start = self._fetch_range(file, 0, 8) if size >= 8 else b""
        length = int.from_bytes(start, "little")
        try:
            if not 0 < length <= min(MAX_HEADER, size - 8):
                raise ValueError(f"it cannot have a header of {length} bytes: it has {size} in all")
            raw = self._fetch_range(file, 8, length)
            return parse_header(raw, self.folder / file, size - 8 - length)
        except (ValueError, RecursionError) as error:
            what = f"{self.key}: {file} is not a readable safetensors file: {error}"
            raise SourceError(Finding(what, "Use another revision, or tell the author.")) from None

    @cached_property
    def _remote_entries(self) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            for header in pool.map(self._remote_header, self._weight_files):
                entries.update(header)
        lost = sorted(set(self._index) - set(entries))
        if lost:
            what = f"{self.key}: the index lists {len(lost)} tensors that no file has"
            raise SourceError(Finding(f"{what}, first {lost[0]}", "Use another revision."))
        return entries

    @cached_property
    def _remote_specs(self) -> dict[str, TensorSpec]:
        return {name: spec for name, (spec, _) in self._remote_entries.items()}

    @cached_property
    def streams(self) -> bool:
        """Whether weights come file by file: safetensors, some of which are not in the cache."""
        return bool(self._missing) and not self._offline and self._weights in WEIGHTS[:2]

    def missing_bytes(self, names: Iterable[str] | None = None) -> int:
        """Return the bytes of weights that are not in the local cache.

        Args:
            names: tensors that are wanted; None for all.
        """
        files = set(self._missing)
        if names is not None and self.streams:  # else all of them come at once
            files &= set(map(self.file_of, names))
        return sum(self._sizes.get(file, 0) for file in files)

    @property
    def largest_missing(self) -> int:
        """Bytes of the largest weights file that is not in the local cache; 0 if all are."""
        return max((self._sizes.get(file, 0) for file in self._missing), default=0)

    @cached_property
    def _files(self) -> TensorFiles:
        return TensorFiles(self._remote_entries)

    def file_of(self, name: str) -> str:
        """Return the weights file that holds tensor `name`."""
        return self._index.get(name, self._weights)

    def span(self, name: str) -> FileSpan:
        """Return where the bytes of tensor `name` will lie in the cache; downloads nothing."""
        return self._files.locate(name)

    def size_of(self, file: str) -> int:
        """Return the bytes of a weights file."""
        return self._sizes[file]

    def sha256_of(self, file: str) -> str:
        """Return the SHA-256 of a weights file, as the Hub tells it of large files."""
        if file not in self._digests:
            self.fetch(file)
            self._digests[file] = sha256(self.folder / file)
        return self._digests[file]

    def has(self, file: str) -> bool:
        """Say whether a weights file is in the local cache."""
        return (self.folder / file).exists()

    def fetch(self, file: str, progress: Callable[[int], None] = lambda count: None) -> None:
        """Download a weights file into the cache, if it is not there.

        Raises:
            HubError: the download failed.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils.tqdm import tqdm

        class Told(tqdm):
            """Says how much has come, and draws nothing."""

            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **{**options, "disable": True})  # type: ignore[no-untyped-call]

            def update(self, n: float | None = 1) -> None:
                progress(int(n or 0))

        if self.has(file):
            return
        try:
            hf_hub_download(
                self.repo_id, self._prefix + file, revision=self.commit, tqdm_class=Told
            )
        except InterruptedError:
            raise
        except Exception as error:  # huggingface_hub raises its own, its HTTP library's and others
            raise explain(error, f"{self.key}, {file}") from error
        self._brought.add(file)

    def evict(self, file: str) -> None:
        """Remove a weights file from the cache if this source has downloaded it."""
        if file in self._brought:
            path = self.folder / file
            self._files.close(self._paths(set(self._weight_files) - {file}))
            for each in (path.resolve(), path):
                each.unlink(missing_ok=True)
            self._brought.discard(file)

    def close(self, keep: Collection[str]) -> None:
        """Close all weights files but `keep`: an open file takes room though it is removed."""
        self._files.close(self._paths(keep))

    def _paths(self, files: Iterable[str]) -> set[Path]:
        return {self.folder / file for file in files}

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return dtype and shape of every tensor, from headers only.

        Headers that are not in the local cache are fetched by range requests, without any weights;
        PyTorch's own files have no header, and are downloaded.
        """
        return self._remote_specs if self.streams else self._local.specs()

    def locate(self, name: str) -> FileSpan | None:
        """Return where the bytes of tensor `name` lie; downloads its file on first use."""
        if not self.streams:
            return self._local.locate(name)
        self.fetch(self.file_of(name))
        return self.span(name)

    def read(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of tensor `name` from byte `start` on.

        Downloads its file on first use.

        Raises:
            HubError: the download failed.
            OSError: the file cannot be read or has become shorter.
        """
        if not self.streams:
            self._local.read(name, start, out)
            return
        self.fetch(self.file_of(name))
        self._files.read(name, start, out)

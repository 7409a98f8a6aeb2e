"""Owns opening LoRA adapters as peft saves them; knows files, and nothing of what they adapt."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from moeforge.errors import Finding, HubError, SourceError
from moeforge.sources import FileSpan, find
from moeforge.sources.files import TensorFiles
from moeforge.sources.folder import INDEX, SINGLE, read_json
from moeforge.sources.header import read_header
from moeforge.tensors import TensorSpec

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
_WANTED = (
    *(CONFIG, WEIGHTS, "README.md"),
    *("tokenizer*", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"),
)
"""What is fetched of a repository: the adapter, its card, and a tokenizer in case it has grown."""


class AdapterSource:
    """A folder with a LoRA adapter.

    Attributes:
        key: its name in the recipe, with the revision.
        config: its adapter_config.json.
        folder: where it lies.

    Raises:
        SourceError: there is no adapter, it is pickled, or it is of a kind that is not LoRA.
    """

    def __init__(self, key: str, folder: Path) -> None:
        self.key = key
        self.folder: Path = folder
        files = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
        refuse_unusable(key, files)
        self.config: dict[str, Any] = read_json(folder / CONFIG)
        kind = self.config.get("peft_type")
        if kind != "LORA":
            what = f"{key} is an adapter of type {kind}, not LORA"
            raise SourceError(Finding(what, "Merge it into its model with peft first."))

    @cached_property
    def _files(self) -> TensorFiles:
        return TensorFiles(read_header(self.folder / WEIGHTS))

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return dtype and shape of every tensor, from the header only."""
        return self._files.specs()

    def locate(self, name: str) -> FileSpan | None:
        """Return where the bytes of tensor `name` lie."""
        return self._files.locate(name)

    def read(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of tensor `name` from byte `start` on.

        Raises:
            OSError: the file cannot be read or has become shorter.
        """
        self._files.read(name, start, out)


def refuse_unusable(key: str, files: set[str]) -> None:
    """Refuse what is no adapter in safetensors, by its file names.

    Raises:
        SourceError: with what it is instead, and the way out.
    """
    if CONFIG not in files:
        if files & {"config.json", SINGLE, INDEX}:
            what = f"{key} is a model, not a LoRA adapter"
            raise SourceError(Finding(what, "Name it as a model, or give the adapter's folder."))
        what = f"{key} has no {CONFIG}, so it is not an adapter"
        raise SourceError(Finding(what, "Give the folder that peft's save_pretrained() wrote."))
    if WEIGHTS not in files:
        if PICKLED in files:
            what = f"{key} is pickled: it has {PICKLED} and no {WEIGHTS}"
            raise SourceError(
                Finding(what, "Load it with peft and save_pretrained() it once: that is safe.")
            )
        what = f"{key} has {CONFIG}, but no {WEIGHTS}"
        raise SourceError(Finding(what, "Download it again, or export it with peft."))


def open_adapter(
    name: str,
    revision: str | None = None,
    *,
    beside: Path = Path(),
    offline: bool = False,
    commit: str | None = None,
) -> AdapterSource:
    """Open a LoRA adapter by path or Hub id; from the Hub it is fetched whole.

    Args:
        name: a path, looked up in `beside` and then in the working directory, or a Hub id.
        revision: branch, tag or commit; Hub only.
        beside: folder of the recipe.
        offline: use only what is in the local Hub cache.
        commit: what the revision stands for; None asks the Hub.

    Raises:
        SourceError: it is neither, or is not a usable adapter.
        HubError: the Hub refused or could not be reached.
    """
    return find(
        name,
        revision,
        beside,
        lambda folder: AdapterSource(name, folder),
        lambda: _fetch(name, revision, commit, offline=offline),
        "adapter ",
    )


def _fetch(
    repo_id: str, revision: str | None, commit: str | None, *, offline: bool
) -> AdapterSource:
    """Put an adapter repository into the local Hub cache and open it."""
    from huggingface_hub import constants, list_repo_files, snapshot_download

    from moeforge.sources.hub import explain

    key = f"{repo_id}@{revision}" if revision else repo_id
    offline = offline or constants.HF_HUB_OFFLINE
    try:
        folder = snapshot_download(
            repo_id,
            revision=commit or revision,
            allow_patterns=list(_WANTED),
            ignore_patterns=["*/*"],  # a star also matches slashes
            local_files_only=offline,
        )
        found = {file.name for file in Path(folder).iterdir()}
        if not {CONFIG, WEIGHTS} <= found and not offline:
            refuse_unusable(key, set(list_repo_files(repo_id, revision=commit or revision)))
    except SourceError:
        raise
    except Exception as error:  # huggingface_hub raises its own, its HTTP library's and others
        raise explain(error, f"adapter {key}") from error
    if offline and CONFIG in found and WEIGHTS not in found:
        what = f"adapter {key}: offline mode is on, and {WEIGHTS} is not in the cache"
        fix = f"Go online once, or fetch it with `hf download {repo_id}`."
        raise HubError(Finding(what, fix))
    return AdapterSource(key, Path(folder))

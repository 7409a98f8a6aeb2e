"""Owns local folders of safetensors files, single or sharded, read by header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from moeforge.errors import Finding, SourceError
from moeforge.sources import FileSpan
from moeforge.sources.files import TensorFiles
from moeforge.sources.header import Entry, read_header
from moeforge.tensors import TensorSpec

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        SourceError: it cannot be read or is something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(Finding(f"{path} cannot be read: {error}")) from None
    if not isinstance(data, dict):
        raise SourceError(Finding(f"{path} does not hold a JSON object"))
    return data


def read_index(key: str, path: Path) -> dict[str, str]:
    """Return the weights file of each tensor of model `key`, from its index file `path`.

    Raises:
        SourceError: it is not an index, or names files outside its folder.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise SourceError(Finding(f"{key}: {path} has no weight_map"))
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or file in ("", ".."):
            raise SourceError(Finding(f"{path} names {file!r}, which is outside the folder"))
    return weight_map


def refuse_unusable(key: str, files: set[str], config: Mapping[str, Any] | None) -> None:
    """Refuse what is no dense safetensors checkpoint, by its file names and config.

    Raises:
        SourceError: with what it is instead, and the way out.
    """
    if config is None:
        if "adapter_config.json" in files:
            what = f"{key} is a LoRA adapter, not a model"
            raise SourceError(Finding(what, "Merge the adapter into its base model first."))
        if any(name.endswith(".gguf") for name in files):
            what = f"{key} holds GGUF files, which are quantised for llama.cpp"
            raise SourceError(Finding(what, "Use the original safetensors checkpoint."))
        what = f"{key} has no config.json, so it is not a model folder"
        raise SourceError(Finding(what, "Give the folder that holds config.json."))
    quantization = config.get("quantization_config")
    if quantization:
        method = (
            quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else ""
        )
        what = f"{key} is quantised ({method}); its numbers cannot be merged"
        raise SourceError(Finding(what, "Use the 16-bit original."))
    if SINGLE not in files and INDEX not in files:
        other = next((name for name in sorted(files) if name.endswith((".bin", ".pt"))), None)
        what = f"{key} has no {SINGLE} and no {INDEX}"
        if other:
            fix = f"It has {other}: load it in transformers and save_pretrained() it once."
            raise SourceError(Finding(what, fix))
        raise SourceError(Finding(what, "Give a folder with safetensors weights."))


class FolderSource:
    """A checkpoint folder on this machine.

    Raises:
        SourceError: it is not one; tensors are missing or a file is damaged.
    """

    def __init__(self, key: str, folder: Path) -> None:
        self.key = key
        self.folder: Path = folder
        if folder.is_file():
            what = f"{key} is a file, not a model folder"
            raise SourceError(Finding(what, "Give the folder that holds config.json."))
        files = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
        config = read_json(folder / "config.json") if "config.json" in files else None
        refuse_unusable(key, files, config)
        self.config: dict[str, Any] = config or {}

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        if (self.folder / SINGLE).exists():
            return read_header(self.folder / SINGLE)
        weight_map = read_index(self.key, self.folder / INDEX)
        entries: dict[str, Entry] = {}
        for file in sorted(set(weight_map.values())):
            found = read_header(self.folder / file)
            # Where two files have a tensor of one name, the index says which one counts.
            entries.update(
                {name: e for name, e in found.items() if weight_map.get(name, file) == file}
            )
        lost = sorted(set(weight_map) - set(entries))
        if lost:
            what = f"{self.key}: the index lists {len(lost)} tensors that no file has"
            raise SourceError(Finding(f"{what}, first {lost[0]}", "Download the model again."))
        return entries

    @cached_property
    def _files(self) -> TensorFiles:
        return TensorFiles(self._entries)

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return dtype and shape of every tensor, from headers only."""
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

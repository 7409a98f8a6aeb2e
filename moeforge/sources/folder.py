"""Owns local checkpoint folders: which weights files count, and what is refused as unusable."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeforge.errors import Finding, SourceError
from moeforge.sources import FileSpan, config_values, pickled
from moeforge.sources.files import TensorFiles
from moeforge.sources.header import Entry, read_header
from moeforge.sources.quantized import refuse_quantized
from moeforge.tensors import TensorSpec
from moeforge.texts import read_text

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHTS = (SINGLE, INDEX, pickled.SINGLE, pickled.INDEX)
"""Files that tell which weights there are, in the order in which they are preferred."""

_CARD = 1_000_000
"""Characters of a card that are looked at; what it was made from stands at its beginning."""

_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        SourceError: it cannot be read or is something else.
    """
    try:
        data = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SourceError(Finding(f"{path} cannot be read: {reason}")) from None
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
        if "/" in file or file in ("", ".", "..") or not file.isprintable():
            raise SourceError(Finding(f"{path} names {file!r}, which is outside the folder"))
    return weight_map


def module_folders(folder: Path) -> list[str]:
    """Return the folders that a sentence-transformers model names as its modules, if it is one.

    Raises:
        SourceError: modules.json is not a list of modules, or one lies outside the folder.
    """
    path = folder / "modules.json"
    if not path.exists():
        return []
    try:
        modules = json.loads(read_text(path))
        names = [str(module["path"]) for module in modules]
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        raise SourceError(Finding(f"{path} is not a list of modules with paths")) from None
    for name in names:
        if name.startswith("/") or ".." in name.split("/"):
            raise SourceError(Finding(f"{path} names {name!r}, which is outside the folder"))
    return list(dict.fromkeys(name.partition("/")[0] for name in names if name))


def original(folder: Path) -> str:
    """Return the model that the card in `folder` names as the one it was made from, or ""."""
    card = folder / "README.md"
    text = ""
    if card.is_file():
        with card.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_CARD)
    named = re.search(r"^base_model:\s*(?:\n\s*)?(?:-\s*)?([\w./-]+)\s*$", text, re.MULTILINE)
    return named[1] if named else ""


def weights_file(files: Container[str]) -> str | None:
    """Return the file that tells which weights there are: of several the first of WEIGHTS."""
    return next((name for name in WEIGHTS if name in files), None)


def refuse_unusable(
    key: str, files: set[str], config: Mapping[str, Any] | None, folder: Path
) -> None:
    """Refuse what is no checkpoint that can be read, by its file names and config.

    Args:
        key: name of the model.
        files: names of all its files.
        config: its config.json; None where there is none.
        folder: where its small files lie.

    Raises:
        SourceError: with what it is instead, and the way out.
    """
    if weights_file(files) is None:
        if "adapter_config.json" in files:
            settings = folder / "adapter_config.json"
            base = read_json(settings).get("base_model_name_or_path") if settings.exists() else None
            what = f"{key} is an adapter" + (f" for {base}" if base else "") + ", not a model"
            raise SourceError(Finding(what, f'Write "{base or "BASE"}+{key}".'))
        if any(name.endswith(".gguf") for name in files):
            what = f"{key} holds GGUF files, which are quantised for llama.cpp"
            named = f", which its card names: {original(folder)}" if original(folder) else ""
            raise SourceError(Finding(what, f"Use the original checkpoint{named}."))
    if config is None:
        what = f"{key} has no config.json, so it is not a model folder"
        raise SourceError(Finding(what, "Give the folder that holds config.json."))
    refuse_quantized(key, config, original(folder))
    config_values.check(config, folder / "config.json")
    if weights_file(files) is None:
        what = f"{key} has none of {', '.join(WEIGHTS)}"
        other = next((name for name in sorted(files) if name.endswith(_OTHER_WEIGHTS)), None)
        if other:
            fix = f"It has {other}: load it in transformers and save_pretrained() it once."
            raise SourceError(Finding(what, fix))
        raise SourceError(Finding(what, "Give a folder with weights."))


class FolderSource:
    """A checkpoint folder on this machine.

    Raises:
        SourceError: it is not one; tensors are missing or a file is damaged.
    """

    def __init__(self, key: str, folder: Path) -> None:
        self.key = key
        self.folder: Path = folder
        if folder.is_file():
            if folder.suffix == ".gguf":
                what = f"{key} is a GGUF file, which is quantised for llama.cpp"
                raise SourceError(Finding(what, "Use the original checkpoint."))
            what = f"{key} is a file, not a model folder"
            raise SourceError(Finding(what, "Give the folder that holds config.json."))
        files = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
        config = read_json(folder / "config.json") if "config.json" in files else None
        refuse_unusable(key, files, config, folder)
        self.config: dict[str, Any] = config or {}
        self._weights = weights_file(files) or ""

    def _read_file(self, file: str) -> tuple[dict[str, Entry], dict[str, Tensor]]:
        if self._weights in (pickled.SINGLE, pickled.INDEX):
            return pickled.read_pickle(self.folder / file)
        return read_header(self.folder / file), {}

    @cached_property
    def _contents(self) -> tuple[dict[str, Entry], dict[str, Tensor]]:
        """Every tensor, and those among them that no span of a file holds as they are."""
        if self._weights in (SINGLE, pickled.SINGLE):
            return self._read_file(self._weights)
        weight_map = read_index(self.key, self.folder / self._weights)
        entries: dict[str, Entry] = {}
        strided: dict[str, Tensor] = {}
        for file in sorted(set(weight_map.values())):
            found, odd = self._read_file(file)
            # Where two files have a tensor of one name, the index says which one counts.
            counts = {name for name in found if weight_map.get(name, file) == file}
            entries.update({name: found[name] for name in counts})
            strided.update({name: odd[name] for name in counts & odd.keys()})
        lost = sorted(set(weight_map) - set(entries))
        if lost:
            what = f"{self.key}: the index lists {len(lost)} tensors that no file has"
            raise SourceError(Finding(f"{what}, first {lost[0]}", "Download the model again."))
        return entries, strided

    @cached_property
    def _files(self) -> TensorFiles:
        return TensorFiles(self._contents[0])

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return dtype and shape of every tensor, from headers only."""
        return self._files.specs()

    def locate(self, name: str) -> FileSpan | None:
        """Return where the bytes of tensor `name` lie; None where they lie in another order."""
        return None if name in self._contents[1] else self._files.locate(name)

    def read(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of tensor `name` from byte `start` on.

        Raises:
            OSError: the file cannot be read or has become shorter.
        """
        if name in self._contents[1]:
            pickled.read_strided(self._contents[1][name], start, out)
        else:
            self._files.read(name, start, out)

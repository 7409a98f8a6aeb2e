"""Owns the lock file of a build: what went in, with which versions, and which bytes came out.

The same build gives the same lock: no times, no places on a disk but those in the recipe. What went
in is named by SHA-256, as on the Hub; what came out by BLAKE3, as the engine hashes it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

from moeforge import hashes
from moeforge.errors import Finding, SourceError
from moeforge.plans import Plan
from moeforge.sealed import Sealed
from moeforge.sources import Source, lies, streamed
from moeforge.sources.folder import read_json
from moeforge.version import __version__

NAME = "moeforge.lock.json"
_FORMAT = 2
HASHED = {1: hashes.SHA256, _FORMAT: hashes.BLAKE3}
"""How files of the output are hashed, by the format of the lock."""
_ABOUT = ("README.md", "moeforge.card.json", "*.png")
"""Files about the model: people change them, and no program that loads it reads them."""
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx")
_UNREAD = (*_ABOUT, "LICENSE*", "NOTICE*", ".*", NAME, "moeforge.yml")
_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "numpy")
_PROMPTS = ("positive_prompts", "negative_prompts")
"""Keys of a recipe whose values are texts, and no names of files."""

Entry = dict[str, Any]


@dataclass(frozen=True)
class Made:
    """What a lock tells of a build beyond its plan.

    Attributes:
        name: stem of the recipe.
        recipe: its text.
        data: the same as plain data.
        find: gives the file that a path in the recipe means.
        device: torch device of the arithmetic.
        shard_size: most bytes of tensors per file.
        routers: source of the router weights, if there are any.
    """

    name: str
    recipe: str
    data: Any
    find: Callable[[str], Path]
    device: str
    shard_size: int
    routers: Source | None = None


def write_lock(
    folder: Path,
    plan: Plan,
    made: Made,
    sealed: Mapping[str, Sealed] | None = None,
    *,
    hash_inputs: bool = False,
) -> None:
    """Write the lock file of the finished build in `folder`; every other file is there already.

    Args:
        folder: the output.
        plan: how it was made.
        made: what else there is to tell.
        sealed: files of it whose hashes are known.
        hash_inputs: read inputs on this machine whole for their hashes, where these are not known.
    """
    lock = {
        "lock": _FORMAT,
        "versions": versions(),
        "name": made.name,
        "recipe": {"sha256": _digest(made.recipe.encode()), "text": made.recipe},
        "settings": {"device": made.device, "shard_size": made.shard_size},
        "seed": made.data.get("seed"),
        "dtype": plan.config.get("dtype"),
        "inputs": {
            source.key: describe(source, hash_inputs=hash_inputs) for source in inputs(plan)
        },
        "files": recipe_files(made.data, made.find),
        "routers": _contents(made.routers) if made.routers else None,
        "outputs": dict(_outputs(folder, sealed or {})),
    }
    save_lock(folder, lock)


def save_lock(folder: Path, data: Mapping[str, Any]) -> None:
    """Write the data of a lock file."""
    text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Return the versions of what computes, without importing it."""
    found = {"moeforge": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def read_lock(path: Path) -> dict[str, Any]:
    """Read a lock file.

    Raises:
        SourceError: it is none, of a format to come, or names files outside its folder.
    """
    lock = read_json(path)
    known = lock.get("lock")
    digest = HASHED.get(known) if isinstance(known, int) else None
    if digest is None:
        formats = " or ".join(map(str, HASHED))
        what = f"{path} is not a lock file of format {formats}: it says {known!r}"
        raise SourceError(Finding(what, "Use the moeforge that wrote it."))
    kinds = {"versions": dict, "name": str, "recipe": dict, "settings": dict}
    kinds |= {"inputs": dict, "files": dict, "outputs": dict}
    for key, kind in kinds.items():
        if not isinstance(lock.get(key), kind):
            raise SourceError(Finding(f"{path} is damaged: {key} is {lock.get(key)!r}"))
    if not isinstance(lock.get("built", {}), dict):
        raise SourceError(Finding(f"{path} is damaged: built is {lock['built']!r}"))
    for name, file in lock["outputs"].items():
        inner = PurePosixPath(name)
        if inner.is_absolute() or ".." in inner.parts:
            raise SourceError(Finding(f"{path} names {name!r}, which is outside the folder"))
        if not isinstance(file, dict) or not {"size", digest} <= file.keys():
            raise SourceError(Finding(f"{path} is damaged: of {name} it says {file!r}"))
    return lock


def inputs(plan: Plan) -> list[Source]:
    """Return the checkpoints and adapters that `plan` reads, each once; nothing in memory only."""
    found = {source.key: source for source in (*plan.sources.values(), plan.donor)}
    return [found[key] for key in sorted(found) if found[key].folder is not None]


def describe(source: Source, *, hash_inputs: bool = False) -> Entry:
    """Return commit and files of an input.

    Of weights on this machine, size and a sample of the bytes; their SHA-256 where it is known or
    asked for. Of everything else, the SHA-256.
    """
    folder = source.folder
    assert folder is not None, "what lies in memory is no input"
    weights, commit, coming = _weights(source), commit_of(source), streamed(source)
    files: dict[str, Entry] = {}
    for name in sorted(weights) if coming else ():
        # It need not be here: the plan may not need it, or it was removed when it was used up.
        files[name] = {"size": coming.size_of(name), "sha256": coming.sha256_of(name)}  # type: ignore[union-attr]
    for path in sorted(folder.iterdir()):
        if path.name in files:
            continue
        if path.name in weights:
            files[path.name] = _fingerprint(path, whole=hash_inputs, hub=commit is not None)
        elif path.is_file() and not any(fnmatch(path.name, p) for p in (*_WEIGHTS, *_UNREAD)):
            files[path.name] = {"size": path.stat().st_size, "sha256": hashes.sha256(path)}
    return {"files": dict(sorted(files.items())), **({"commit": commit} if commit else {})}


def commit_of(source: Source) -> str | None:
    """Return the commit of what was fetched from the Hub; None for other sources."""
    found = re.search(r"/models--[^/]+/snapshots/([0-9a-f]{40})(/|$)", f"{source.folder}")
    return found[1] if found else None


def _weights(source: Source) -> set[str]:
    """Return the names of the files that hold the tensors of `source`."""
    spans = {name: lies(source, name) for name in source.specs()}
    found = {span.path.name for span in spans.values() if span}
    if None in spans.values():  # tensors of PyTorch's files that do not lie in them as they are
        folder = source.folder or Path()
        found |= {path.name for path in folder.glob("pytorch_model*.bin")}
    return found


def _fingerprint(path: Path, *, whole: bool, hub: bool) -> Entry:
    """Return size and sample of a weights file, and its SHA-256 where there is one.

    Of a file of the Hub its SHA-256 alone, as where it is not here any more.
    """
    size = path.stat().st_size
    if size <= hashes.BLOCKS * hashes.BLOCK:  # the sample would be all of it
        return {"size": size, "sha256": hashes.sha256(path)}
    digest = hashes.known(path)
    if digest is None and whole:
        digest = hashes.sha256(path)
        hashes.remember(path, digest)
    if digest and hub:
        return {"size": size, "sha256": digest}
    entry: Entry = {"size": size, "sample": hashes.sample(path)}
    return {**entry, "sha256": digest} if digest else entry


def recipe_files(data: Any, find: Callable[[str], Path]) -> dict[str, Entry]:
    """Return size and SHA-256 of each file that the recipe names: prompts, texts."""
    found: dict[str, Entry] = {}
    for text in sorted(set(_texts(data))):
        with suppress(OSError, ValueError):
            path = find(text)
            if path.is_file():
                found[text] = {"size": path.stat().st_size, "sha256": hashes.sha256(path)}
    return found


def _texts(data: Any) -> Iterator[str]:
    """Yield the texts in a recipe that may be names of files."""
    if isinstance(data, str) and data and len(data) < 1000 and "\n" not in data:
        yield data
    elif isinstance(data, dict):
        for key, value in data.items():
            if key not in _PROMPTS:
                yield from _texts(value)
    elif isinstance(data, list):
        for value in data:
            yield from _texts(value)


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _contents(source: Source) -> str:
    """Return the SHA-256 of all tensors of `source`, in the order of their names."""
    digest = hashlib.sha256()
    for name, spec in sorted(source.specs().items()):
        raw = bytearray(spec.nbytes)
        source.read(name, 0, memoryview(raw))
        digest.update(f"{name} {spec}\n".encode())
        digest.update(raw)
    return digest.hexdigest()


def output_entry(path: Path, kind: str) -> Entry:
    """Return size and hash of a file of the output, hashed as `HASHED` says."""
    return {"size": path.stat().st_size, kind: hashes.digest_of(path, kind)}


def _outputs(folder: Path, sealed: Mapping[str, Sealed]) -> Iterator[tuple[str, Entry]]:
    """Yield each file of the output with size and BLAKE3."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name == NAME or any(fnmatch(name, p) for p in _ABOUT):
            continue
        if seal := sealed.get(name):
            yield name, {"size": seal.nbytes, hashes.BLAKE3: seal.blake3}
        else:
            yield name, output_entry(path, hashes.BLAKE3)

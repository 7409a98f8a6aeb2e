"""Owns putting router weights into a finished checkpoint, and showing that nothing else moved.

Knows files of tensors and their headers; knows nothing of training.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeforge import catalog, families
from moeforge.errors import BuildError, Finding
from moeforge.hashes import BLAKE3, Digest, begin
from moeforge.routing import Router
from moeforge.shown import show_size
from moeforge.sources import FileSpan
from moeforge.sources.folder import FolderSource
from moeforge.system import COPY_CHUNK, copy_range, open_file, write_at
from moeforge.tensors import DType, TensorSpec
from moeforge.texts import refuse_links

if TYPE_CHECKING:
    from torch import Tensor

_HASHED = 2**22
"""Bytes hashed at a time."""


@dataclass(frozen=True)
class Place:
    """Where the weight of a router lies on disk.

    Attributes:
        router: its name in the model that transformers has loaded.
        name: its name on disk.
        span: its bytes in a weights file.
        dtype: how they are stored.
    """

    router: str
    name: str
    span: FileSpan
    dtype: DType


def places(folder: Path, found: Sequence[Router]) -> list[Place]:
    """Return where the routers of the checkpoint in `folder` lie.

    A tensor is a router's if its name is the one that the family on the shelf gives it (of other
    types: if its name has the number of the layer), and its shape and every value are those that
    transformers has loaded.

    Args:
        folder: the checkpoint, in safetensors.
        found: the routers of the same checkpoint, loaded in float32 and not changed since.

    Raises:
        SourceError: the folder is no checkpoint.
        BuildError: it has no routers, or for one of them there is not exactly one such tensor.
    """
    if not found:
        what = f"{folder} is not a mixture of experts that can be tuned: it has no routers"
        raise BuildError(Finding(what, "Give the folder of a mixture of experts."))
    source = FolderSource(str(folder), folder)
    specs = source.specs()
    return [_place(source, specs, router) for router in found]


def _place(source: FolderSource, specs: Mapping[str, TensorSpec], router: Router) -> Place:
    kind = str(source.config.get("model_type"))
    if kind in catalog.names("families"):
        names = [families.load(kind).router.format(layer=router.layer)]
    else:
        names = [name for name in specs if f".{router.layer}." in name]
    shape = tuple(router.weight.shape)
    names = [name for name in names if name in specs and specs[name].shape == shape]
    names = [name for name in names if _holds(source, specs[name], name, router)]
    if len(names) != 1:
        said = f"{len(names)} tensors" if names else "no tensor"
        what = f"{router.name} {list(shape)} of {kind} is {said} in {source.folder}"
        fix = "It cannot be told where its weights lie. Save the model as safetensors first."
        raise BuildError(Finding(what, "" if names else fix))
    (name,) = names
    span = source.locate(name)
    if span is None or span.path.suffix != ".safetensors":
        what = f"{source.folder} holds its weights in .bin files, which are not patched"
        raise BuildError(Finding(what, "Save the model as safetensors first."))
    return Place(router.name, name, span, specs[name].dtype)


def _holds(source: FolderSource, spec: TensorSpec, name: str, router: Router) -> bool:
    """Say whether tensor `name` has exactly the values of the router's weight."""
    import torch

    from moeforge.engine.buffers import torch_dtype

    if not spec.dtype.mergeable:
        return False
    raw = bytearray(spec.nbytes)
    source.read(name, 0, memoryview(raw))
    stored = torch.frombuffer(raw, dtype=torch_dtype(spec.dtype)).reshape(spec.shape)
    return torch.equal(stored.to(router.weight.dtype), router.weight.detach().cpu())


def stored_dtypes(found: Iterable[Place]) -> dict[str, Any]:
    """Return the torch dtype of each router's weight on disk, by its name in the model."""
    from moeforge.engine.buffers import torch_dtype

    return {place.router: torch_dtype(place.dtype) for place in found}


def copy_checkpoint(folder: Path, to: Path) -> None:
    """Copy everything in `folder` into the empty folder `to`; links become what they point to.

    Raises:
        SourceError: a link leads to something else than what it is called.
        BuildError: the disk refuses.
    """
    needed = sum(item.stat().st_size for item in folder.rglob("*") if item.is_file())
    if needed > (free := shutil.disk_usage(to).free):
        what = f"a copy takes {show_size(needed)}, {to.parent} has {show_size(free)} free"
        raise BuildError(Finding(what, "Choose another disk with -o."))
    for item in sorted(folder.iterdir()):
        if item.name.startswith("."):
            continue  # of version control and download caches
        refuse_links(item)
        if item.is_dir():
            shutil.copytree(item, to / item.name, copy_function=_copy)
        else:
            _copy(item, to / item.name)


def _copy(source: Any, target: Any) -> None:
    """Copy a file in the kernel, which shares the blocks where the file system can."""
    reading = open_file(source, os.O_RDONLY)
    try:
        writing = open_file(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            size, done = os.fstat(reading).st_size, 0
            while done < size:
                count = copy_range(reading, writing, min(COPY_CHUNK, size - done), done, done)
                if not count:
                    raise OSError(f"{source} ended early")
                done += count
        finally:
            os.close(writing)
    finally:
        os.close(reading)


def patch(folder: Path, found: Sequence[Place], weights: Mapping[str, Tensor]) -> None:
    """Write router weights over those in the checkpoint `folder`, byte for byte in their place.

    Args:
        folder: a checkpoint with the files that `found` speaks of, by the same names.
        found: where the routers lie.
        weights: by name in the model.
    """
    import torch

    from moeforge.engine.buffers import torch_dtype

    for place in found:
        stored = weights[place.router].detach().cpu().to(torch_dtype(place.dtype)).contiguous()
        raw: Any = stored.view(torch.uint8).flatten().numpy()
        data = memoryview(raw)
        assert len(data) == place.span.nbytes
        file = open_file(folder / place.span.path.name, os.O_WRONLY)
        try:
            offset = place.span.offset
            while data:
                count = write_at(file, data, offset)
                data, offset = data[count:], offset + count
            os.fsync(file)
        finally:
            os.close(file)


def fingerprint(folder: Path, found: Sequence[Place]) -> dict[str, str]:
    """Return the BLAKE3 of every weights file in `folder`, its routers' bytes left out.

    Headers and the order of the tensors count; so two checkpoints with equal fingerprints have
    the same tensors but for the routers.

    Args:
        folder: the checkpoint.
        found: where the routers lie; of their paths only the names count.
    """
    return {
        file.name: _hash(file, [p.span for p in found if p.span.path.name == file.name])
        for file in sorted(folder.glob("*.safetensors"))
    }


def _hash(file: Path, without: Sequence[FileSpan]) -> str:
    total, at = begin(BLAKE3), 0
    with file.open("rb") as stream:
        for span in sorted(without, key=lambda span: span.offset):
            _take(stream, span.offset - at, total)
            at = span.offset + span.nbytes
            stream.seek(at)
        _take(stream, file.stat().st_size - at, total)
    return total.hexdigest()


def _take(stream: Any, count: int, total: Digest) -> None:
    """Put the next `count` bytes of `stream` into the hash `total`."""
    while count:
        data = stream.read(min(count, _HASHED))
        if not data:
            raise OSError(f"{stream.name} ended early")
        total.update(data)
        count -= len(data)

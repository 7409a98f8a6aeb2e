"""Owns PyTorch's own checkpoint files (`pytorch_model.bin`): a zip with a pickle and raw tensors.

Only tensors are taken, and only through torch's `weights_only` reader, which runs no code of the
file. Torch maps the file instead of reading it; most tensors are then read as spans of the file.
Source: https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from moeforge import tensors
from moeforge.errors import Finding, SourceError
from moeforge.sources import FileSpan
from moeforge.sources.header import Entry
from moeforge.tensors import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"

_LOCAL_HEADER = 30
"""Bytes of a zip entry's own header before its name; PKWARE APPNOTE 4.3.7."""


def _data_offsets(path: Path) -> list[int]:
    """Return where in the file the bytes of each non-empty storage begin, in order.

    Raises:
        ValueError: a storage is compressed, or of the other byte order.
    """
    offsets = []
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            _, _, inner = info.filename.partition("/")
            if inner == "byteorder" and archive.read(info) != b"little":
                raise ValueError("it was saved on a big-endian machine")
            if not inner.startswith("data/") or not info.file_size:
                continue
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{info.filename} is compressed")
            file.seek(info.header_offset)
            header = file.read(_LOCAL_HEADER)
            name, extra = header[26:28], header[28:30]
            length = int.from_bytes(name, "little") + int.from_bytes(extra, "little")
            offsets.append(info.header_offset + _LOCAL_HEADER + length)
    return sorted(offsets)


def _load(path: Path) -> dict[str, Tensor]:
    """Return the tensors of `path`, mapped.

    Raises:
        ValueError: it holds something else, or what torch will not load without running code.
    """
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        also = f": {named[1]}" if named else ""
        raise ValueError(f"it holds more than tensors{also}; loading it could run code") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds a {type(loaded).__name__}, not tensors by name")
    for name, value in loaded.items():
        if not isinstance(value, torch.Tensor) or not isinstance(name, str):
            raise ValueError(f"{name!r} in it is a {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or str(value.dtype)[6:] not in tensors.BY_NAME:
            raise ValueError(f"{name} in it is {value.dtype} and {value.layout}")
    return loaded


def read_pickle(path: Path) -> tuple[dict[str, Entry], dict[str, Tensor]]:
    """Return the tensors of `path`: spans of those that lie in it as they are, and mapped others.

    Others are transposed and otherwise strided tensors, and empty ones.

    Raises:
        SourceError: it is damaged, of the format before torch 1.6, or holds more than tensors.
    """
    try:
        if path.stat().st_size and not zipfile.is_zipfile(path):
            raise ValueError("it is damaged, or of the format before torch 1.6")
        offsets = _data_offsets(path)
        loaded = _load(path)
        storages = [tensor.untyped_storage() for tensor in loaded.values()]
        pointers = sorted({storage.data_ptr() for storage in storages if storage.nbytes()})
        base = pointers[0] - offsets[0] if pointers and offsets else 0
        # What maps the file does not say where: only if all distances agree is it known.
        if [pointer - base for pointer in pointers] != offsets:
            raise ValueError("its tensors do not lie where its table of contents says")
    except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        what = f"{path} is not a readable PyTorch checkpoint: {error}"
        fix = "Download it again, or use a safetensors copy of the model."
        raise SourceError(Finding(what, fix)) from None
    entries: dict[str, Entry] = {}
    strided: dict[str, Tensor] = {}
    for name, tensor in loaded.items():
        spec = TensorSpec(tensors.BY_NAME[str(tensor.dtype)[6:]], tuple(tensor.shape))
        offset = tensor.data_ptr() - base if tensor.numel() and tensor.is_contiguous() else 0
        entries[name] = (spec, FileSpan(path, offset, spec.nbytes))
        if not offset:
            strided[name] = tensor
    return entries, strided


def read_strided(tensor: Tensor, start: int, out: memoryview) -> None:
    """Fill `out` with the row-major bytes of `tensor` from byte `start` on.

    Only the slices along the first dimension that hold these bytes are gathered.
    """
    import torch

    if not len(out):
        return
    row = tensor[0].numel() * tensor.element_size()
    first, last = start // row, (start + len(out) - 1) // row
    rows = tensor.detach()[first : last + 1].contiguous().view(-1).view(torch.uint8)
    begin = start - first * row
    torch.frombuffer(out, dtype=torch.uint8).copy_(rows[begin : begin + len(out)])

"""Owns the safetensors header: parsing and checking it before anything believes it.

Format: 8 bytes little-endian length, a JSON object {name: {dtype, shape, data_offsets}}, the data.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moeforge import tensors
from moeforge.errors import Finding, SourceError
from moeforge.sources import FileSpan
from moeforge.tensors import TensorSpec

MAX_HEADER = 100_000_000
"""Bytes; the limit of the reference implementation."""

Entry = tuple[TensorSpec, FileSpan]


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a name appears twice")
    return mapping


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _parse_entry(name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"entry {name!r} lacks dtype, shape or data_offsets")
    dtype = tensors.BY_CODE.get(str(entry["dtype"]))
    if dtype is None:
        raise ValueError(f"{name} has the unknown dtype {entry['dtype']!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise ValueError(f"{name} has the impossible shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ValueError(f"{name} has the impossible offsets {offsets!r}")
    spec = TensorSpec(dtype, tuple(shape))
    if offsets[1] - offsets[0] != spec.nbytes:
        said = f"{offsets[1] - offsets[0]} bytes for {spec}, which takes {spec.nbytes}"
        raise ValueError(f"{name} has {said}")
    return spec, offsets[0], offsets[1]


def parse_header(raw: bytes, path: Path, data_bytes: int) -> dict[str, Entry]:
    """Turn a header's JSON into specs and spans.

    Args:
        raw: the JSON, without its length.
        path: the file, for spans and messages.
        data_bytes: bytes of the file after the header.

    Raises:
        ValueError: it is not a header, or tensors overlap, leave holes or end elsewhere than the
            file.
    """
    header = json.loads(raw, object_pairs_hook=_reject_duplicates)
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    header.pop("__metadata__", None)
    parsed = {name: _parse_entry(name, entry) for name, entry in header.items()}
    position = 0
    for name, (_, begin, end) in sorted(parsed.items(), key=lambda item: item[1][1:]):
        if begin != position:
            raise ValueError(
                f"{name} starts at byte {begin}, but the one before ends at {position}"
            )
        position = end
    if position != data_bytes:
        said = f"the header promises {position} bytes of data, the file has {data_bytes}"
        raise ValueError(f"{said}; it is damaged or was not downloaded whole")
    base = 8 + len(raw)
    return {
        name: (spec, FileSpan(path, base + begin, end - begin))
        for name, (spec, begin, end) in parsed.items()
    }


def read_header(path: Path) -> dict[str, Entry]:
    """Read the header of the safetensors file `path`.

    Raises:
        SourceError: the file is missing, short or lies about its contents.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise ValueError(f"it cannot have a header of {length} bytes: it has {size} in all")
            return parse_header(file.read(length), path, size - 8 - length)
    except (OSError, ValueError, RecursionError) as error:
        what = f"{path} is not a readable safetensors file: {error}"
        raise SourceError(Finding(what, "Download or export that file again.")) from None

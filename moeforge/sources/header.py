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


def _reject_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a name appears twice")
    return mapping


_LONGEST_NAME = 500
_MOST_DIMENSIONS = 64
"""Torch has no more."""
_BELOW_A_BYTE = ("F4", "F6_E2M3", "F6_E3M2")
"""Dtypes of the format with several elements in a byte, or in three."""


def _check_name(name: str) -> None:
    """Refuse names that no model has, and that would write on terminals."""
    if not name or len(name) > _LONGEST_NAME or not name.isprintable():
        shown = repr(name[:40]) if len(name) > _LONGEST_NAME else repr(name)
        raise ValueError(f"it has a tensor with the impossible name {shown}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _parse_entry(name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    _check_name(name)
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"entry {name!r} lacks dtype, shape or data_offsets")
    if extra := sorted(entry.keys() - {"dtype", "shape", "data_offsets"}):
        raise ValueError(f"{name} has the unknown key {_short(extra[0])}")
    dtype = tensors.BY_CODE.get(str(entry["dtype"]))
    if entry["dtype"] in _BELOW_A_BYTE:
        raise ValueError(f"{name} is {entry['dtype']}, which is quantised below a byte")
    if dtype is None:
        raise ValueError(f"{name} has the unknown dtype {_short(entry['dtype'])}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if (
        not isinstance(shape, list)
        or len(shape) > _MOST_DIMENSIONS
        or not all(map(_is_count, shape))
    ):
        raise ValueError(f"{name} has the impossible shape {_short(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ValueError(f"{name} has the impossible offsets {_short(offsets)}")
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
    if not raw.startswith(b"{"):
        raise ValueError("the header is not a JSON object")
    header = json.loads(
        raw.decode("utf-8"),
        object_pairs_hook=_reject_duplicates,
        parse_constant=_reject_constant,
    )
    metadata = header.pop("__metadata__", None)
    texts = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if metadata is not None and not texts:
        raise ValueError("its __metadata__ is not a mapping of texts to texts")
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
        if not path.is_file():
            raise ValueError("it is not a regular file")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise ValueError(f"it cannot have a header of {length} bytes: it has {size} in all")
            return parse_header(file.read(length), path, size - 8 - length)
    except (OSError, ValueError, RecursionError) as error:
        what = f"{path} is not a readable safetensors file: {error}"
        raise SourceError(Finding(what, "Download or export that file again.")) from None

"""Owns where every output byte goes: shard names, headers and offsets, final before any is written.

Shards and their index follow the conventions of `save_pretrained` in transformers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moeforge.plans import PlannedTensor

DEFAULT_SHARD_SIZE = 5_000_000_000
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """A tensor and the byte of its file where it begins."""

    tensor: PlannedTensor
    offset: int


@dataclass(frozen=True)
class Shard:
    """An output file.

    Attributes:
        name: file name.
        header: everything before the tensors: length, JSON, padding.
        entries: the tensors, in the order of the file.
        nbytes: size of the file.
    """

    name: str
    header: bytes
    entries: tuple[Entry, ...]
    nbytes: int


def _split(tensors: Sequence[PlannedTensor], limit: int) -> list[list[PlannedTensor]]:
    groups: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.spec.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.spec.nbytes
    return groups


def _shard(name: str, tensors: Sequence[PlannedTensor]) -> Shard:
    # Wide elements first: every tensor then begins at a multiple of its element size, which
    # readers that map the file need.
    ordered = sorted(tensors, key=lambda tensor: -tensor.spec.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in ordered:
        spec = tensor.spec
        header[tensor.name] = {
            "dtype": spec.dtype.code,
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text
    entries = []
    offset = len(raw)
    for tensor in ordered:
        entries.append(Entry(tensor, offset))
        offset += tensor.spec.nbytes
    return Shard(name, raw, tuple(entries), offset)


def lay_out(
    tensors: Sequence[PlannedTensor], shard_size: int = DEFAULT_SHARD_SIZE
) -> tuple[Shard, ...]:
    """Distribute `tensors` over files of at most `shard_size` bytes of data, in their order.

    A tensor larger than that gets a file of its own.
    """
    groups = _split(tensors, shard_size)
    if len(groups) == 1:
        return (_shard("model.safetensors", groups[0]),)
    total = len(groups)
    return tuple(
        _shard(f"model-{number:05d}-of-{total:05d}.safetensors", group)
        for number, group in enumerate(groups, 1)
    )


def index(shards: Sequence[Shard]) -> str | None:
    """Return the text of the index file, or None where one file holds everything."""
    if len(shards) == 1:
        return None
    entries = [(entry, shard.name) for shard in shards for entry in shard.entries]
    total = sum(entry.tensor.spec.nbytes for entry, _ in entries)
    weight_map = {entry.tensor.name: name for entry, name in entries}
    return (
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
    )

"""Owns a hash of all that the bytes of an output's weights follow from, inputs unread."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moeforge.hashes import BLAKE3
from moeforge.output.layout import Shard
from moeforge.plans import ROUTERS, Concat, Gather, Plan, dump, walk
from moeforge.sources import Source
from moeforge.version import __version__

_READ = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja", ".tiktoken", ".py")
"""Endings of the files of an input that the output may follow from."""


def fingerprint(plan: Plan, shards: Sequence[Shard], device: str, more: Sequence[str]) -> str:
    """Return the hash of a build.

    Args:
        plan: what is made.
        shards: how it is divided into files.
        device: kind of device that computes it.
        more: what router weights follow from beside the plan.
    """
    digest = hashlib.sha256()

    def add(*values: Any) -> None:
        digest.update(json.dumps(values, sort_keys=True, default=str).encode() + b"\n")

    # Journals of builds before BLAKE3 hold other hashes: their files are not taken over.
    add(__version__, BLAKE3, *((name, version(name)) for name in ("torch", "transformers")), device)
    add(plan.config, dict(plan.code), *more)
    for shard in shards:
        add(shard.name, shard.nbytes)
        digest.update(shard.header)
    tables = set[int]()
    for tensor in plan.tensors:
        add(tensor.name, str(tensor.spec), dump(tensor.expr))
        for part in walk(tensor.expr):
            if isinstance(part, Concat):
                add([str(spec) for _, spec in part.pieces])
            elif isinstance(part, Gather):
                table = part.table
                add(str(part.table.source.dtype), table.means, table.padding)
                if id(table) not in tables:
                    tables.add(id(table))
                    digest.update(table.source.tobytes() + table.row.tobytes())
    for key, source in sorted(plan.sources.items()):
        if key != ROUTERS:
            add(key, *_identity(source))
    return digest.hexdigest()


def _identity(source: Source) -> Iterator[Any]:
    """Yield what changes where the source does: its commit, or its files' sizes and times."""
    if commit := getattr(source, "commit", None):
        yield commit
        return
    folder = source.folder or getattr(source, "directory", None)
    for file in sorted(Path(folder).iterdir()) if folder else ():
        if file.suffix in _READ and file.is_file():
            stat = file.stat()
            yield str(file.resolve()), stat.st_size, stat.st_mtime_ns

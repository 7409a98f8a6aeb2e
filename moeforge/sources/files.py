"""Owns reading tensors that lie in files as they are; knows spans of bytes, and no format."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path

from moeforge.sources import FileSpan
from moeforge.sources.header import Entry
from moeforge.system import open_file, read_at
from moeforge.tensors import TensorSpec


class TensorFiles:
    """Tensors by name, each with the span of a file that holds its bytes.

    Files are opened when they are first read and stay open; several threads may read at once.

    Args:
        entries: spec and span of each tensor, as `read_header` returns them.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = entries
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    @cached_property
    def _specs(self) -> dict[str, TensorSpec]:
        return {name: spec for name, (spec, _) in self._entries.items()}

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return dtype and shape of every tensor."""
        return self._specs

    def locate(self, name: str) -> FileSpan:
        """Return where the bytes of tensor `name` lie."""
        return self._entries[name][1]

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = open_file(path, os.O_RDONLY)
            return self._descriptors[path]

    def read(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of tensor `name` from byte `start` on.

        Raises:
            OSError: the file cannot be read or has become shorter.
        """
        span = self._entries[name][1]
        descriptor = self._descriptor(span.path)
        done = 0
        while done < len(out):
            count = read_at(descriptor, out[done:], span.offset + start + done)
            if not count:
                raise OSError(f"{span.path} ended early while reading {name}")
            done += count

    def close(self, keep: Collection[Path]) -> None:
        """Close all files but those of `keep`; nobody may be reading the others."""
        with self._lock:
            for path in [path for path in self._descriptors if path not in keep]:
                os.close(self._descriptors.pop(path))

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)

"""Owns checkpoints held in memory: router weights, and stand-ins for files in tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeforge.sources import FileSpan
from moeforge.tensors import TensorSpec


class MemorySource:
    """Tensors as raw bytes.

    Args:
        key: name that is unique within a plan.
        tensors: spec and row-major little-endian bytes of each tensor.
        config: what config.json would say.
    """

    folder: Path | None = None

    def __init__(
        self,
        key: str,
        tensors: Mapping[str, tuple[TensorSpec, bytes]],
        config: dict[str, Any] | None = None,
    ) -> None:
        for name, (spec, data) in tensors.items():
            if len(data) != spec.nbytes:
                raise ValueError(f"{name}: {len(data)} bytes for {spec}")
        self.key = key
        self.config = config or {}
        self._tensors = dict(tensors)
        self._specs = {name: spec for name, (spec, _) in tensors.items()}

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return dtype and shape of every tensor."""
        return self._specs

    def locate(self, name: str) -> FileSpan | None:
        """Return None: no file has these bytes."""
        return None

    def read(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of tensor `name` from byte `start` on."""
        out[:] = self._tensors[name][1][start : start + len(out)]

"""Owns comparing two checkpoints, tensor by tensor, in slices; knows nothing of how it looks."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeforge.bars import Count, counted
from moeforge.shown import Shown
from moeforge.sources import Source, open_source
from moeforge.system import cores
from moeforge.tensors import DType, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CHUNK = 2**18
"""Elements that a thread compares at a time."""
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_EXPERT = re.compile(r"\.(experts)\.\d+\.")
OUTSIDE = "outside layers"


@dataclass(frozen=True)
class Sums:
    """What is added up over pairs of values (a, b), in float64.

    Attributes:
        aa: Σ a².
        bb: Σ b².
        ab: Σ a·b.
        dd: Σ (a - b)².
        largest: max |a - b|.
    """

    aa: float = 0.0
    bb: float = 0.0
    ab: float = 0.0
    dd: float = 0.0
    largest: float = 0.0

    @property
    def cosine(self) -> float:
        """Of the angle between the two; 1 where both are zero, 0 where one of them is."""
        if not self.aa or not self.bb:
            return float(self.aa == self.bb)
        return self.ab / math.sqrt(self.aa) / math.sqrt(self.bb)

    @property
    def relative(self) -> float:
        """‖a - b‖ / ‖a‖; infinite where only a is zero."""
        if self.dd == 0:
            return 0.0
        return math.sqrt(self.dd / self.aa) if self.aa else math.inf


def together(sums: Iterable[Sums]) -> Sums:
    """Return the sums of several parts."""
    every = list(sums)
    return Sums(
        sum(each.aa for each in every),
        sum(each.bb for each in every),
        sum(each.ab for each in every),
        sum(each.dd for each in every),
        max((each.largest for each in every), default=0.0),
    )


@dataclass(frozen=True)
class Compared:
    """A tensor that one or both have.

    Attributes:
        name: its name.
        a: dtype and shape in the first; None where it is only in the other.
        b: the same of the second.
        equal: the bytes are the same.
        sums: None where the shapes differ or one is absent.
    """

    name: str
    a: TensorSpec | None
    b: TensorSpec | None
    equal: bool
    sums: Sums | None

    @property
    def layer(self) -> str:
        """Number of its layer, or OUTSIDE."""
        found = _LAYER.search(self.name)
        return found[1] if found else OUTSIDE

    @property
    def kind(self) -> str:
        """What it is in its layer; the experts of a layer are one kind."""
        found = _LAYER.search(self.name)
        inner = self.name[found.end() :] if found else self.name
        return _EXPERT.sub(r".\1.*.", f".{inner}")[1:].removesuffix(".weight")


@dataclass(frozen=True, repr=False)
class Difference(Shown):
    """Two checkpoints, compared.

    Attributes:
        a: name of the first.
        b: name of the second.
        tensors: every tensor that one of them has, in the order of names.
    """

    a: str
    b: str
    tensors: tuple[Compared, ...]

    @property
    def same(self) -> bool:
        """Whether both have the same tensors, byte for byte."""
        return all(tensor.equal for tensor in self.tensors)

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers in their order, what is outside last."""
        found = {tensor.layer for tensor in self.tensors}
        return tuple(sorted(found, key=lambda layer: (layer == OUTSIDE, _number(layer))))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of tensors in layers, in the order of names."""
        return tuple(sorted({t.kind for t in self.tensors if t.layer != OUTSIDE}))

    def of(self, layer: str, kind: str | None = None) -> list[Compared]:
        """Return the tensors of a layer, or those of one kind in it."""
        return [t for t in self.tensors if t.layer == layer and kind in (None, t.kind)]


def _number(layer: str) -> int:
    return int(layer) if layer.isdigit() else 0


def diff(
    a: str | Path,
    b: str | Path,
    *,
    offline: bool = False,
    progress: Count | bool = False,
) -> Difference:
    """Compare two checkpoints, tensor by tensor.

    Args:
        a: folder or Hub id, `id@revision` included.
        b: the same.
        offline: use only what is in the local Hub cache.
        progress: True to see it; or what is told bytes of the first that were compared, and all.

    Raises:
        SourceError: one is no checkpoint that can be read.
        HubError: the Hub refused or could not be reached.
    """
    one, other = (_open(name, offline=offline) for name in (a, b))
    mine, theirs = one.specs(), other.specs()
    names = sorted(mine.keys() | theirs.keys(), key=_natural)
    total = sum(mine[name].nbytes for name in names if name in mine and name in theirs)
    lock, done, tell = threading.Lock(), 0, counted(progress, "tensors")

    def compare(name: str) -> Compared:
        nonlocal done
        left, right = mine.get(name), theirs.get(name)
        if left is None or right is None or left.shape != right.shape:
            return Compared(name, left, right, equal=False, sums=None)
        equal, sums = _compare(one, other, name, left, right)
        with lock:
            done += left.nbytes
            tell(done, total)
        return Compared(name, left, right, equal, sums)

    for source, specs in ((one, mine), (other, theirs)):  # what lies on the Hub is fetched once
        for name in list(specs)[:1]:
            source.locate(name)
    with ThreadPoolExecutor(cores()) as pool:
        return Difference(one.key, other.key, tuple(pool.map(compare, names)))


def _open(model: str | Path, *, offline: bool) -> Source:
    name = str(model)
    if not Path(name).expanduser().exists() and "@" in name:
        name, _, revision = name.partition("@")
        return open_source(name, revision, offline=offline)
    return open_source(name, offline=offline)


def _natural(name: str) -> list[Any]:
    """Return a key by which layer 10 comes after layer 9."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name)]


def _compare(
    one: Source, other: Source, name: str, left: TensorSpec, right: TensorSpec
) -> tuple[bool, Sums]:
    """Compare a tensor that both have in one shape; say whether it is the same, byte for byte."""
    import numpy as np

    equal, parts = left.dtype == right.dtype, []
    for start in range(0, left.numel, _CHUNK):
        count = min(_CHUNK, left.numel - start)
        raw_a = _read(one, name, left.dtype, start, count)
        raw_b = _read(other, name, right.dtype, start, count)
        a = widened(raw_a, left.dtype)
        if left.dtype == right.dtype and raw_a == raw_b:
            aa = float(np.einsum("i,i->", a, a))
            parts.append(Sums(aa, aa, aa))
            continue
        equal = False
        b = widened(raw_b, right.dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            aa, bb, ab = (float(np.einsum("i,i->", x, y)) for x, y in ((a, a), (b, b), (a, b)))
            a -= b
            dd, largest = float(np.einsum("i,i->", a, a)), float(np.abs(a, out=a).max())
        parts.append(Sums(aa, bb, ab, dd, largest))
    return equal, together(parts)


def _read(source: Source, name: str, dtype: DType, start: int, count: int) -> bytearray:
    raw = bytearray(count * dtype.itemsize)
    source.read(name, start * dtype.itemsize, memoryview(raw))
    return raw


def widened(raw: bytearray, dtype: DType) -> NDArray[Any]:
    """Return the values in `raw` in float64."""
    import numpy as np

    values: NDArray[Any]
    if dtype.name == "bfloat16":
        bits = np.frombuffer(raw, dtype="<u2").astype(np.uint32) << np.uint32(16)
        values = bits.view(np.float32)
    elif dtype.name.startswith("float8"):
        import torch

        codes = torch.frombuffer(raw, dtype=torch.uint8).view(getattr(torch, dtype.name))
        values = codes.to(torch.float32).numpy()
    else:
        values = np.frombuffer(raw, dtype=np.dtype(dtype.name))
    return values.astype(np.float64)

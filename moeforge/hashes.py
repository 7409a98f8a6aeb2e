"""Owns hashes of files: of all bytes, of a sample of them, and those that are known already.

What is made here is hashed by BLAKE3, which takes a fifth of the time; what goes into a build and
what goes to the Hub by SHA-256, for the Hub names files by it. That takes half a second per GB:
what was hashed once is remembered in $XDG_CACHE_HOME/moeforge, for as long as size, time and inode
of the file stay what they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from blake3 import blake3

from moeforge.system import user_cache

BLAKE3, SHA256 = "blake3", "sha256"
TITLES = {BLAKE3: "BLAKE3", SHA256: "SHA-256"}
"""The kinds of digests, as files of data and as people name them."""

BLOCKS, BLOCK = 256, 16_384
"""A sample is the header of a safetensors file and this many blocks of this many bytes."""
_MAX_HEADER = 100_000_000
_CHUNK = 2**20
_HUB_BLOB = re.compile(r"[0-9a-f]{64}")


class Digest(Protocol):
    """A hash that is being computed."""

    def update(self, data: memoryview | bytes, /) -> object:
        """Take the next bytes."""

    def hexdigest(self) -> str:
        """Return the hash of all bytes so far, as hexadecimal digits."""


def begin(kind: str) -> Digest:
    """Return a hash of no bytes yet."""
    return blake3() if kind == BLAKE3 else hashlib.sha256()


def digests(
    path: Path, kinds: Iterable[str], progress: Callable[[int], None] = lambda done: None
) -> dict[str, str]:
    """Return hashes of all bytes of `path`, which is read once.

    Args:
        path: a file.
        kinds: which are wanted.
        progress: told how many bytes were read since it was told last.

    Returns:
        Hexadecimal digits, by kind.
    """
    begun, buffer = {kind: begin(kind) for kind in kinds}, memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            for digest in begun.values():
                digest.update(buffer[:count])
            progress(count)
    return {kind: digest.hexdigest() for kind, digest in begun.items()}


def digest_of(path: Path, kind: str, progress: Callable[[int], None] = lambda done: None) -> str:
    """Return the hash of one kind of all bytes of `path`; see `digests`."""
    return digests(path, (kind,), progress)[kind]


def sha256(path: Path) -> str:
    """Return the SHA-256 of all bytes of `path`, as hexadecimal digits."""
    return digest_of(path, SHA256)


def sample(path: Path) -> str:
    """Return the SHA-256 of a few MB of `path`: of its header, and of blocks all over it.

    It differs where another model, another training run or another dtype stands in the file, and
    need not differ where single values do.
    """
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb", buffering=0) as file:
        if size <= BLOCKS * BLOCK:
            digest.update(file.read())
            return digest.hexdigest()
        if path.suffix == ".safetensors":
            length = 8 + int.from_bytes(file.read(8), "little")
            file.seek(0)
            digest.update(file.read(min(length, _MAX_HEADER)))
        for number in range(BLOCKS):
            file.seek((size - BLOCK) * number // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def known(path: Path) -> str | None:
    """Return the SHA-256 of `path` where that needs no reading; else None.

    The Hub's cache names large files by it, and others may have been hashed before.
    """
    real = path.resolve()
    if path.is_symlink() and real.parent.name == "blobs" and _HUB_BLOB.fullmatch(real.name):
        return real.name
    with suppress(OSError, ValueError, KeyError):
        entry = json.loads(_entry(real).read_text(encoding="utf-8"))
        if entry["state"] == _state(real):
            return str(entry["sha256"])
    return None


def remember(path: Path, digest: str) -> None:
    """Remember that `digest` is the SHA-256 of `path`; where that cannot be kept, it is not."""
    real = path.resolve()
    with suppress(OSError):
        entry = _entry(real)
        entry.parent.mkdir(parents=True, exist_ok=True)
        half = entry.with_suffix(f".{os.getpid()}")
        half.write_text(json.dumps({"state": _state(real), "sha256": digest}), encoding="utf-8")
        half.replace(entry)


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _entry(path: Path) -> Path:
    """Return the file that remembers `path`."""
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
    return user_cache() / "hashes" / f"{name}.json"

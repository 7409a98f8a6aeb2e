"""Owns whether a folder is still what its lock file says, and what becomes of that on a change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeforge.errors import Finding
from moeforge.hashes import BLAKE3, TITLES
from moeforge.output.lock import HASHED, NAME, output_entry, read_lock, save_lock

_AGAIN = "Build or download the checkpoint again."


@dataclass(frozen=True)
class Locked:
    """What a lock file says of the files beside it.

    Attributes:
        files: size and hash of each, by name; empty where there is no lock file.
        kind: how they are hashed: "blake3", in older lock files "sha256".
    """

    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    kind: str = BLAKE3


def locked_files(folder: Path) -> Locked:
    """Return what the lock file, if there is one, says of the files of the checkpoint `folder`.

    Raises:
        SourceError: there is one, and it is not a lock file.
    """
    path = folder / NAME
    if not path.exists():
        return Locked()
    data = read_lock(path)
    kind = HASHED[data["lock"]]
    files = {name: (file["size"], file[kind]) for name, file in data["outputs"].items()}
    return Locked(files, kind)


def differences(folder: Path, locked: Locked, digests: Mapping[str, str]) -> list[Finding]:
    """Compare files with the lock.

    Args:
        folder: the checkpoint.
        locked: what the lock lists.
        digests: hashes, of the lock's kind, of those that were hashed; of others the size alone is
            compared.
    """
    findings = []
    for name, (size, digest) in sorted(locked.files.items()):
        path = folder / name
        if not path.is_file():
            findings.append(Finding(f"{name} is in {NAME}, and is not here", _AGAIN))
        elif path.stat().st_size != size:
            what = f"{name} has {path.stat().st_size} bytes, {NAME} says {size}"
            findings.append(Finding(what, _AGAIN))
        elif digests.get(name, digest) != digest:
            what = f"{name} is not what was built: its {TITLES[locked.kind]} is "
            what += f"{digests[name][:16]}…"
            findings.append(Finding(f"{what}, {NAME} says {digest[:16]}…", _AGAIN))
    return findings


def renew(folder: Path, names: Iterable[str]) -> None:
    """Make the lock file, if there is one, true of files that were changed on purpose.

    What the build had made of them stays in it, under "built", for a rebuild to compare with.

    Args:
        folder: the checkpoint.
        names: files that may have changed.

    Raises:
        SourceError: the lock file is none.
    """
    if not (folder / NAME).exists():
        return
    data = read_lock(folder / NAME)
    outputs, kind = data["outputs"], HASHED[data["lock"]]
    for name in outputs.keys() & set(names):
        found = output_entry(folder / name, kind)
        if found != outputs[name]:
            data.setdefault("built", {}).setdefault(name, outputs[name])
            outputs[name] = found
    save_lock(folder, data)


def built(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return size and hash of each file as the build made it, from the data of a lock file."""
    return {**data["outputs"], **data.get("built", {})}

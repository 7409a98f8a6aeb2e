"""Owns whether a folder is still what its lock file says, and what becomes of that on a change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moeforge.errors import Finding
from moeforge.hashes import sha256
from moeforge.output.lock import NAME, read_lock, save_lock

_AGAIN = "Build or download the checkpoint again."


def locked_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Return size and SHA-256 of each file that the lock file lists; empty where there is none.

    Raises:
        SourceError: there is one, and it is not a lock file.
    """
    path = folder / NAME
    if not path.exists():
        return {}
    return {
        name: (file["size"], file["sha256"]) for name, file in read_lock(path)["outputs"].items()
    }


def differences(
    folder: Path, locked: Mapping[str, tuple[int, str]], digests: Mapping[str, str]
) -> list[Finding]:
    """Compare files with the lock.

    Args:
        folder: the checkpoint.
        locked: what the lock lists.
        digests: SHA-256 of those that were hashed; of others the size alone is compared.
    """
    findings = []
    for name, (size, digest) in sorted(locked.items()):
        path = folder / name
        if not path.is_file():
            findings.append(Finding(f"{name} is in {NAME}, and is not here", _AGAIN))
        elif path.stat().st_size != size:
            what = f"{name} has {path.stat().st_size} bytes, {NAME} says {size}"
            findings.append(Finding(what, _AGAIN))
        elif digests.get(name, digest) != digest:
            what = f"{name} is not what was built: its SHA-256 is {digests[name][:16]}…"
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
    outputs = data["outputs"]
    for name in outputs.keys() & set(names):
        path = folder / name
        found = {"size": path.stat().st_size, "sha256": sha256(path)}
        if found != outputs[name]:
            data.setdefault("built", {}).setdefault(name, outputs[name])
            outputs[name] = found
    save_lock(folder, data)


def built(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return size and SHA-256 of each file as the build made it, from the data of a lock file."""
    return {**data["outputs"], **data.get("built", {})}

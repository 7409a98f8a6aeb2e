"""Owns whether a folder is still what its lock file says was built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moeforge.errors import Finding
from moeforge.output.lock import NAME, read_lock

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

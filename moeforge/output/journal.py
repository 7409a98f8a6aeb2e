"""Owns what a build that was stopped has finished: written down in its work folder, trusted later.

Knows names, sizes and hashes of files; knows nothing of what is in them.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moeforge.errors import BuildError, Finding
from moeforge.hashes import BLAKE3, digest_of
from moeforge.output.staging import locked, publish, work_folder
from moeforge.sealed import Sealed
from moeforge.shown import show_size
from moeforge.system import FULL, room_of, sync

_NAME, _MODEL = "journal.json", "model"
ROUTERS = "routers"
"""The file of the work folder that holds router weights."""


class Journal:
    """The finished files of a build.

    Args:
        root: the work folder, locked.
        fingerprint: of everything that the bytes of the weights follow from.
        note: told what is taken over, and what is not.

    Attributes:
        folder: where the output is made.
        kept: files of it that an earlier run finished.
        routers: the router weights that it computed, as bytes; None where there are none.
    """

    def __init__(self, root: Path, fingerprint: str, note: Callable[[Finding], None]) -> None:
        self.root, self.folder, self._fingerprint = root, root / _MODEL, fingerprint
        self._lock = threading.Lock()
        self._sealed: dict[str, Sealed] = self._trusted(note)
        self._clean()
        self.kept = {name: seal for name, seal in self._sealed.items() if name != ROUTERS}
        path = root / ROUTERS
        self.routers = path.read_bytes() if ROUTERS in self._sealed else None

    def _path(self, name: str) -> Path:
        return self.root / name if name == ROUTERS else self.folder / name

    def _trusted(self, note: Callable[[Finding], None]) -> dict[str, Sealed]:
        """Return what an earlier run of this build finished and is still as it was."""
        fingerprint, files = _written(self.root)
        if not files:
            return {}
        if fingerprint != self._fingerprint:
            what = f"{len(files)} files that another build of it left unfinished are discarded"
            note(Finding(f"{what}: the recipe, an input or moeforge has changed since"))
            return {}
        trusted = {}
        for name, seal in files.items():
            if self._is_whole(name, seal):
                trusted[name] = seal
            else:
                what = f"{name} is not as the last run left it: it is made again"
                note(Finding(what, "If that recurs, check the disk.", warning=True))
        if trusted:
            size = sum(seal.nbytes for seal in trusted.values())
            what = f"going on where the last run stopped: {_listed(trusted)}, {show_size(size)}"
            note(Finding(f"{what}, are taken over"))
        return trusted

    def _is_whole(self, name: str, seal: Sealed) -> bool:
        path = self._path(name)
        try:
            return (
                not path.is_symlink()
                and path.stat().st_size == seal.nbytes
                and digest_of(path, BLAKE3) == seal.blake3
            )
        except OSError:
            return False

    def _clean(self) -> None:
        """Remove all that is not trusted."""
        wanted = {self._path(name) for name in self._sealed}
        for folder in (self.root, self.folder):
            for item in folder.iterdir() if folder.is_dir() else ():
                if item in wanted or item == self.folder:
                    continue
                if item.is_dir() and not item.is_symlink():
                    shutil.rmtree(item)
                else:
                    item.unlink()
        self.folder.mkdir(exist_ok=True)
        if self._sealed:
            self._write()

    def add(self, name: str, seal: Sealed) -> None:
        """Write down that file `name`, which is on the disk, is finished; from any thread."""
        with self._lock:
            self._sealed[name] = seal
            self._write()

    def forget(self, names: Iterable[str]) -> None:
        """Write down that files are about to change: a run to come makes them again."""
        with self._lock:
            for name in names:
                self._sealed.pop(name, None)
            self._write()

    def keep_routers(self, data: bytes) -> None:
        """Keep router weights for a run to come."""
        path = self.root / ROUTERS
        path.write_bytes(data)
        sync(path)
        self.add(ROUTERS, Sealed(digest_of(path, BLAKE3), len(data)))

    def _write(self) -> None:
        data = {
            "fingerprint": self._fingerprint,
            "inode": self.folder.stat().st_ino,
            "files": {name: [seal.blake3, seal.nbytes] for name, seal in self._sealed.items()},
        }
        half = self.root / f"{_NAME}.half"
        half.write_text(json.dumps(data, indent=1), encoding="utf-8")
        sync(self.folder)
        sync(half)
        os.replace(half, self.root / _NAME)
        sync(self.root)

    def stop(self) -> str:
        """Remove what is unfinished; return what is kept, in words, empty for nothing."""
        if not self._sealed:
            shutil.rmtree(self.root, ignore_errors=True)
            return ""
        try:
            self._clean()
        except OSError:  # a disk that does not even take the journal keeps nothing
            shutil.rmtree(self.root, ignore_errors=True)
            return ""
        return (
            f"{_listed(self._sealed)} finished and kept in {self.root}: run the same command to go "
            "on from there, or remove that folder"
        )


def _written(root: Path) -> tuple[str, dict[str, Sealed]]:
    """Return fingerprint and finished files by the journal of a work folder, or none."""
    try:
        found = json.loads((root / _NAME).read_text(encoding="utf-8"))
        files = {str(name): Sealed(*entry) for name, entry in found["files"].items()}
        # A folder that took the place of ours is the model that was replaced.
        if found["inode"] == (root / _MODEL).stat().st_ino:
            return str(found["fingerprint"]), files
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return "", {}


@dataclass(frozen=True)
class Unfinished:
    """What a stopped build has left beside its output, files unread.

    Attributes:
        kept: names of the weights files that the same build goes on with.
        routers: whether it goes on with router weights, too.
        freed: bytes of disk that it gives back before it writes anything.
    """

    kept: frozenset[str] = frozenset()
    routers: bool = False
    freed: int = 0


def unfinished(out: Path, fingerprint: Callable[[], str]) -> Unfinished:
    """Return what `building` finds where an earlier run was stopped; changes nothing.

    Args:
        out: the output folder.
        fingerprint: returns that of the build; called where there is something to compare.
    """
    root = work_folder(out)
    made, files = _written(root)
    if files and made != fingerprint():
        files = {}
    kept, freed = set[str](), 0
    try:
        for folder in (root, root / _MODEL):
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.is_dir() or path.is_symlink():
                    continue
                if path.name in files and path.stat().st_size == files[path.name].nbytes:
                    kept.add(path.name)
                else:
                    freed += room_of(path)
    except OSError:  # that build is going on, or ends
        return Unfinished()
    return Unfinished(frozenset(kept - {ROUTERS}), ROUTERS in kept, freed)


def _listed(files: dict[str, Sealed]) -> str:
    count = len(files) - (ROUTERS in files)
    parts = [f"{count} weights file{'s' if count > 1 else ''}"] if count else []
    parts += ["the router weights"] if ROUTERS in files else []
    return " and ".join(parts)


@contextmanager
def building(
    out: Path, fingerprint: str, *, overwrite: bool, note: Callable[[Finding], None]
) -> Iterator[Journal]:
    """Give the journal of a build, whose folder is published as `out` when the block ends.

    If it ends with an error, finished files are kept, and the error's `__notes__` say so.

    Raises:
        BuildError: `out` exists and `overwrite` is not set, another build is making it, or the
            disk refuses.
    """
    with locked(out, overwrite=overwrite) as root:
        try:
            journal = Journal(root, fingerprint, note)
        except BaseException:
            if not (root / _NAME).exists():  # nothing of an earlier run is in it
                shutil.rmtree(root, ignore_errors=True)
            raise
        try:
            try:
                yield journal
                publish(journal.folder, out.absolute(), root, overwrite=overwrite)
            except BrokenPipeError:
                raise
            except OSError as error:
                raise BuildError(disk_finding(error, out)) from error
        except BaseException as error:
            if said := journal.stop():
                # The attribute behind add_note(), which Python 3.10 does not have.
                error.__notes__ = [*getattr(error, "__notes__", ()), said]  # type: ignore[attr-defined]
            raise
        shutil.rmtree(root, ignore_errors=True)


def disk_finding(error: OSError, out: Path) -> Finding:
    """Say which file the system refused, and why."""
    where = f"{error.filename}: " if error.filename else ""
    what = f"{where}{error.strerror or error}"
    if error.errno in FULL:
        free = shutil.disk_usage(out.absolute().parent).free
        what += f"; {out.absolute().parent} has {show_size(free)} free"
    return Finding(what, "Nothing was published.")

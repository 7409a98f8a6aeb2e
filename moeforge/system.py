"""Owns every call that not all systems have: files, locks, memory, cores, forks.

On Linux each is the call that is best there. Elsewhere it is what Windows or macOS has in its
place, or it does nothing; nobody else asks which system this is. Tensors get the same bytes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2
_OPEN_ON_MACOS = 10_240
FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
"""What the kernel says where there is no room, or none left of a quota."""

_LINUX = sys.platform == "linux"
_WINDOWS = sys.platform == "win32"

FORKS = _LINUX and hasattr(os, "fork")
"""Whether a process with torch in it can be forked safely."""


@cache
def _call(name: str) -> Any:
    """Return a function of Linux that Python has no name for; None elsewhere."""
    return getattr(ctypes.CDLL(None, use_errno=True), name, None) if _LINUX else None


# --- the machine ---------------------------------------------------------------------------------


def cores() -> int:
    """Return how many cores this process may use, or where nobody says that, how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory() -> int:
    """Return the bytes of memory that can still be taken: of the machine, or of its container."""
    free = 0
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = 1024 * int(next(x for x in lines if x.startswith("MemAvailable")).split()[1])
    if not free:
        free = int(import_module("psutil").virtual_memory().available)
    with suppress(OSError, ValueError):  # a container's own limit; "max" where there is none
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        taken = int((group / "memory.current").read_text(encoding="ascii"))
        free = min(free, limit - taken)
    return max(free, 0)


def allow_files() -> None:
    """Let this process have as many files open as the system lets it.

    Models of a trillion parameters lie in more files than the 1024 that a shell often sets.
    """
    try:
        resource: Any = import_module("resource")
    except ImportError:
        return  # Windows has no such limit on what os.open returns
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (most, _OPEN_ON_MACOS):  # where the limit is none at all, macOS refuses it
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
            return


# --- processes -----------------------------------------------------------------------------------


def after_fork(act: Callable[[], None]) -> None:
    """Have every process that is forked from this one call `act` first."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=act)


@contextmanager
def held_back(*signals: signal.Signals) -> Iterator[None]:
    """Let signals wait until the block has ended; in processes forked in it until `let_through`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_through(*signals: signal.Signals) -> None:
    """Let signals come that were held back."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


# --- files ---------------------------------------------------------------------------------------


def open_file(path: str | Path, flags: int) -> int:
    """Open a file for its bytes as they are; `flags` are those of os.open."""
    return os.open(path, flags | getattr(os, "O_BINARY", 0), 0o644)


_PLACES = [threading.Lock() for _ in range(64)]
"""Held while the place of a descriptor is set and used, where that takes two calls."""


def read_at(descriptor: int, out: memoryview, start: int) -> int:
    """Read from byte `start` of a file into `out`; return how many bytes came, 0 at its end."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [out], start)
    with _PLACES[descriptor % len(_PLACES)], open(descriptor, "rb", 0, closefd=False) as file:
        os.lseek(descriptor, start, os.SEEK_SET)
        return file.readinto(out)


def write_at(descriptor: int, data: memoryview, start: int) -> int:
    """Write `data` at byte `start` of a file; return how many bytes were taken."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, start)
    with _PLACES[descriptor % len(_PLACES)]:
        os.lseek(descriptor, start, os.SEEK_SET)
        return os.write(descriptor, data)


COPY_CHUNK = 2**26
"""Bytes per call of copy_file_range: short enough for Ctrl-C."""
_NO_KERNEL_COPY = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


def copy_range(source: int, target: int, count: int, start: int, to: int) -> int:
    """Copy up to `count` bytes between descriptors, in the kernel where it can; return how many."""
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, target, count, start, to)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
    data = memoryview(bytearray(min(count, 2**20)))
    data = data[: read_at(source, data, start)]
    return write_at(target, data, to) if data else 0


def allocate(descriptor: int, nbytes: int) -> None:
    """Give a file its size, and the room for it where the file system can promise that.

    Not os.posix_fallocate: where the file system cannot, the C library writes into every block.

    Raises:
        OSError: there is not enough room.
    """
    os.truncate(descriptor, nbytes)
    fallocate = _call("fallocate")
    if fallocate is None or not nbytes:
        return
    if fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)):
        code = ctypes.get_errno()
        if code in FULL or code == errno.EFBIG:
            raise OSError(code, os.strerror(code))


def room_of(file: int | Path) -> int:
    """Return the bytes of disk that a file takes, holes apart where the system tells of them."""
    stat = os.stat(file)
    return int(stat.st_blocks * 512 if hasattr(stat, "st_blocks") else stat.st_size)


def begin_writing(descriptor: int, start: int, count: int) -> None:
    """Let the disk begin to write a part of a file, so that less is left for fsync."""
    call = _call("sync_file_range")
    if call is not None:
        call(descriptor, ctypes.c_int64(start), ctypes.c_int64(count), _SYNC_FILE_RANGE_WRITE)


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk.

    Raises:
        OSError: the disk could not write them.
    """
    if _WINDOWS and path.is_dir():
        return  # a folder cannot be opened; NTFS keeps a journal of names
    descriptor = open_file(path, os.O_RDWR if _WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


# --- folders -------------------------------------------------------------------------------------


def user_cache() -> Path:
    """Return the folder in the user's cache for what moeforge keeps from one command to the next.

    Raises:
        RuntimeError: nobody says where the user's home is.
    """
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "moeforge"


def exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; say whether the file system can do that."""
    call = _call("renameat2")
    if call is None:
        return False
    names = (os.fsencode(one), os.fsencode(other))
    return not call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)


def lock_folder(folder: Path) -> Callable[[], None] | None:
    """Make `folder` and lock it against other processes, which need not know that it is there.

    Returns:
        What lets go of it; None where another process has it.

    Raises:
        OSError: the folder cannot be made.
    """
    return _lock_beside(folder) if _WINDOWS else _lock_itself(folder)


def _lock_itself(folder: Path) -> Callable[[], None] | None:
    fcntl: Any = import_module("fcntl")
    while True:
        folder.mkdir(exist_ok=True)
        lock = open_file(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), folder.stat()):
                return lambda: os.close(lock)
        except BlockingIOError:
            os.close(lock)
            return None
        except FileNotFoundError:
            pass
        os.close(lock)  # a build that ended just now took the folder with it: make it anew


def _lock_beside(folder: Path) -> Callable[[], None] | None:
    """Lock a file beside `folder`: Windows opens no folders, and renames none with open files."""
    msvcrt: Any = import_module("msvcrt")
    name = folder.with_name(f"{folder.name}.lock")
    lock = open_file(name, os.O_RDWR | os.O_CREAT)
    try:
        msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)
    except OSError:
        os.close(lock)
        return None

    def let_go() -> None:
        os.close(lock)
        with suppress(OSError):  # another process has opened it meanwhile, and removes it
            name.unlink()

    folder.mkdir(exist_ok=True)
    return let_go

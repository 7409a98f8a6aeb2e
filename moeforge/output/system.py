"""Owns the calls of Linux that Python has no names for; elsewhere each says that it did nothing."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2
FULL = {errno.ENOSPC, errno.EDQUOT}
"""What the kernel says where there is no room, or none left of a quota."""


@cache
def _call(name: str) -> Any:
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), name, None)


def allow_files() -> None:
    """Let this process have as many files open as the system lets it.

    Models of a trillion parameters lie in more files than the 1024 that a shell often sets.
    """
    if sys.platform == "linux":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


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


def begin_writing(descriptor: int, start: int, count: int) -> None:
    """Let the disk begin to write a part of a file, so that less is left for fsync."""
    call = _call("sync_file_range")
    if call is not None:
        call(descriptor, ctypes.c_int64(start), ctypes.c_int64(count), _SYNC_FILE_RANGE_WRITE)


def exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; say whether the file system can do that."""
    call = _call("renameat2")
    if call is None:
        return False
    names = (os.fsencode(one), os.fsencode(other))
    return not call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk.

    Raises:
        OSError: the disk could not write them.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


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
    data = os.pread(source, min(count, 2**20), start)
    return os.pwrite(target, data, to) if data else 0

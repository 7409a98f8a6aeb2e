"""Owns how the ranks of a launch talk, and how each learns that another is lost or has failed.

Rank 0 leads; every other rank has one connection, to it. Knows nothing of what they do together.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from moeforge.errors import BuildError, Finding, MoeforgeError
from moeforge.system import after_fork

SILENCE = 60.0
"""Seconds after which a rank that says nothing is given up."""
_BEAT, _POLL = 0.5, 0.1
"""Seconds between two signs of life, and between two looks at the others."""
_PARTING, _REASON = 10.0, 1.0
"""Seconds that the others get to end their work, and in which the reason of a stop is known."""
_LONGEST = 2**26
"""Bytes of a message at most."""
_STOPPED = 130
"""Exit code of a command that was interrupted."""


class Lost(BuildError):
    """A rank has gone without a word."""


class Link:
    """A connection to another rank: JSON, a line each way."""

    def __init__(self, peer: socket.socket) -> None:
        peer.settimeout(SILENCE)
        self._peer, self._lines, self._lock = peer, peer.makefile("rb"), threading.Lock()

    def send(self, **message: Any) -> None:
        """Send a message; that the other is gone is noticed where it is read."""
        data = json.dumps(message).encode() + b"\n"
        with self._lock, suppress(OSError):
            self._peer.sendall(data)

    def read(self) -> dict[str, Any]:
        """Return the next message.

        Raises:
            OSError: the connection ended, or nothing came for SILENCE.
            ValueError: what came is no message.
        """
        line = self._lines.readline(_LONGEST)
        if not line:
            raise ConnectionResetError("its connection ended")
        message: dict[str, Any] = json.loads(line)
        return message

    def end(self) -> None:
        """Send nothing more."""
        with suppress(OSError):
            self._peer.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Neither send nor read any more; a thread that reads wakes up."""
        with suppress(OSError):
            self._peer.shutdown(socket.SHUT_RDWR)
        self._peer.close()

    def forget(self) -> None:
        """Let go of the connection in a forked process, which leaves it as it is."""
        with suppress(OSError):
            os.close(self._peer.detach())


class Group:
    """The ranks of a launch, as one of them sees them: rank 0 all others, the others rank 0.

    Args:
        rank: of this process.
        size: number of ranks.
        links: its connections, by rank.
        local: number of this process among those of its machine, and how many they are.
    """

    def __init__(
        self, rank: int, size: int, links: Mapping[int, Link], local: tuple[int, int]
    ) -> None:
        self.rank, self.size, self.local = rank, size, local
        self.written = 0  # bytes, which every sign of life tells
        self._links = dict(links)
        self._said: dict[int, dict[str, Any]] = {other: {} for other in links}
        self._gone: dict[int, str] = {}
        self._ears: dict[str, Callable[[Any], None]] = {}
        self._error: BaseException | None = None
        self._change, self._over = threading.Condition(), threading.Event()
        for link in links.values():
            # In a worker that is forked it would live on when this process has ended.
            after_fork(partial(_forget, weakref.ref(link)))
        for other, link in links.items():
            threading.Thread(target=self._read, args=(other, link), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def tell(self, **message: Any) -> None:
        """Send a message to all others."""
        for link in self._links.values():
            link.send(**message)

    def listen(self, key: str, ear: Callable[[Any], None]) -> None:
        """Have `ear` called, by some thread, with each value of `key` that is told from now on."""
        self._ears[key] = ear

    def said(self, key: str) -> dict[int, Any]:
        """Return the last value of `key` that each other rank has told, by rank."""
        with self._change:
            return {other: said[key] for other, said in self._said.items() if key in said}

    def wait(self, key: str, meanwhile: Callable[[], None] = lambda: None) -> dict[int, Any]:
        """Wait until all others have told `key`; return its values, by rank.

        Args:
            key: of the message.
            meanwhile: called now and then.

        Raises:
            BuildError: as `check`.
        """
        while True:
            self.check()
            if len(found := self.said(key)) == len(self._links):
                return found
            meanwhile()
            with self._change:
                left = [other for other in self._gone if key not in self._said[other]]
                if left and not self._trouble():
                    raise Lost(_lost(self.rank, left[0], "it left"))
                self._change.wait(_POLL)

    def check(self) -> None:
        """See whether all is well with the others.

        Raises:
            BuildError: one is lost or has failed; without findings where rank 0 tells them.
            KeyboardInterrupt: one was asked to stop.
        """
        with self._change:
            if not self._trouble():
                return
            _in_peace()
            for other, said in self._said.items():
                if "failed" in said:
                    raise _failed(said["code"], *(_of_rank(other, *f) for f in said["failed"]))
            for other, why in self._gone.items():
                if not self._said[other].keys() & {"stopped", "left"}:
                    raise Lost(_lost(self.rank, other, why))
            if self._error is not None:
                raise self._error
            raise KeyboardInterrupt

    def _trouble(self) -> bool:
        ended = any("left" not in self._said[other] for other in self._gone)
        told = any(said.keys() & {"failed", "stopped"} for said in self._said.values())
        return ended or told or self._error is not None

    def _is_explained(self) -> bool:
        every = self._said.values()
        lost = any(not self._said[other].keys() & {"left", "stopped"} for other in self._gone)
        failed = self._error is not None or any("failed" in said for said in every)
        return lost or failed or all("asked" in said for said in every)

    def watching(
        self, progress: Callable[[str, int, int], None]
    ) -> Callable[[str, int, int], None]:
        """Return `progress` that sees, too, whether all is well with the others."""

        def told(phase: str, done: int, total: int) -> None:
            self.check()
            progress(phase, done, total)

        return told

    @contextmanager
    def together(self) -> Iterator[None]:
        """End the launch where the block ends with an error, and wait until the others have ended.

        Raises:
            BuildError: without findings on ranks other than 0: rank 0 tells them.
        """
        try:
            yield
        except BaseException as error:
            if self._over.is_set():
                raise
            reason = self._reason(error)
            if reason is error:
                raise
            raise reason from error

    def _reason(self, error: BaseException) -> BaseException:
        """Tell the others of `error`, and wait for them; return what to raise."""
        if isinstance(error, KeyboardInterrupt):
            # A launcher that sees one rank end stops all others: that is no wish of the user's.
            self.tell(asked=True)
            with self._change:
                self._change.wait_for(self._is_explained, _REASON)
        if self.rank or isinstance(error, KeyboardInterrupt):
            try:
                self.check()  # what rank 0 has ended may fail in other ways, too
            except BuildError as reason:
                error = reason
            except KeyboardInterrupt:
                pass
        _in_peace()
        if isinstance(error, KeyboardInterrupt):
            code = _STOPPED
            self.tell(stopped=True)
        else:
            code = getattr(error, "exit_code", 1)
            self.tell(failed=_entries(error) if self.rank else [], code=code)
        self._part()
        told = isinstance(error, (MoeforgeError, KeyboardInterrupt)) and not isinstance(error, Lost)
        return _failed(code) if self.rank and told else error

    def _part(self) -> None:
        """Say goodbye, and wait until the others do."""
        self.tell(left=True)
        self._over.set()
        for link in self._links.values():
            link.end()
        with self._change:
            self._change.wait_for(lambda: len(self._gone) == len(self._links), _PARTING)

    def leave(self) -> None:
        """Go in peace."""
        if not self._over.is_set():
            self._part()
        for link in self._links.values():
            link.close()

    def _read(self, other: int, link: Link) -> None:
        try:
            while True:
                message = link.read()
                self._hear(message)
                with self._change:
                    self._said[other].update(message)
                    self._change.notify_all()
        except TimeoutError:
            why = f"it has said nothing for {SILENCE:.0f} s"
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
        with self._change:
            self._gone[other] = why
            self._change.notify_all()
        if self.rank == 0:
            link.end()  # the others may still be at work, and say so by not ending theirs

    def _hear(self, message: Mapping[str, Any]) -> None:
        for key in message.keys() & self._ears.keys():
            try:
                self._ears[key](message[key])
            except BaseException as error:
                self._error = error  # raised where the others are looked after

    def _beat(self) -> None:
        while not self._over.wait(_BEAT):
            self.tell(written=self.written)


def _forget(link: weakref.ref[Link]) -> None:
    if (known := link()) is not None:
        known.forget()


def _in_peace() -> None:
    """Keep the launcher's SIGTERM from what is left to do, which takes moments."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _lost(rank: int, other: int, why: str) -> Finding:
    seen = f"rank {rank}: " if rank else ""
    what = f"{seen}rank {other} is lost: {why}"
    fix = "If it was killed, memory may have run out: use fewer ranks or --threads. "
    return Finding(what, f"{fix}Nothing was published; the same command goes on from here.")


def _failed(code: int, *findings: Finding) -> BuildError:
    error = BuildError(*findings)
    error.exit_code = code
    return error


def _entries(error: BaseException) -> list[Any]:
    found = error.findings if isinstance(error, MoeforgeError) else (Finding(repr(error)),)
    return [[f.what, f.fix, list(f.path), f.line] for f in found]


def _of_rank(rank: int, what: str, fix: str, path: list[str | int], line: int) -> Finding:
    return Finding(f"rank {rank}: {what}", fix, tuple(path), line)

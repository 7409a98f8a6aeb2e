"""Owns joining the processes of a launch: who this process is among them, and who can reach whom.

`accelerate launch` and torchrun say it in environment variables; torch's store does the rest.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from moeforge.errors import BuildError, Finding
from moeforge.ranks.group import SILENCE, Group, Link
from moeforge.system import cores

JOIN, _RETRY = 300.0, 0.5
"""Seconds in which all ranks must have come, and after which one knocks again."""
_SHORT, _POLL = 2.0, 0.05
"""Seconds that torch may wait at a time, and between two looks into the store."""

_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """Where a process stands in its launch, in torch's words."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def place() -> Place | None:
    """Return where this process stands in a launch; None where it is the only one."""
    given = os.environ
    if "RANK" not in given or given.get("WORLD_SIZE", "1") == "1":
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, size, *local = (int(given.get(name, name.endswith("SIZE"))) for name in names)
    return Place(rank, size, *local)


def leads() -> bool:
    """Say whether this process is the first of its launch, or the only one."""
    where = place()
    return where is None or where.rank == 0


def remark() -> Finding | None:
    """Return what is odd about how this process was launched."""
    if "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        what = "the launcher has set MASTER_ADDR but not RANK: it has started one process only"
        fix = "On the CPU, accelerate launch starts several with --multi_gpu only."
        return Finding(what, fix, warning=True)
    return None


@contextmanager
def joined() -> Iterator[Group | None]:
    """Give the group of this process's launch; None where it is the only one.

    Where the block ends with an error, the whole launch does.

    Raises:
        BuildError: the ranks do not find each other, one is lost, or has failed.
    """
    where = place()
    if where is None:
        yield None
        return
    if where.rank == 0 and os.environ.get("OMP_NUM_THREADS") == "1":
        # That is what launchers set, for programs whose ranks all compute at the same time.
        del os.environ["OMP_NUM_THREADS"]
        import torch

        torch.set_num_threads(cores())
    links = _links(where)
    # Libraries that find these in the environment wait for the other ranks.
    hidden = {name: os.environ.pop(name) for name in _LAUNCH if name in os.environ}
    group = Group(where.rank, where.size, links, (where.local_rank, where.local_size))
    try:
        with group.together():
            yield group
    finally:
        group.leave()
        os.environ.update(hidden)


def _links(where: Place) -> dict[int, Link]:
    """Return the connections of this process, by rank."""
    until = time.monotonic() + JOIN
    try:
        store = _store(where, until)
        if where.rank == 0:
            return _welcome(store, where, until)
        return {0: _greet(store, where, until)}
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        what = f"rank {where.rank} of {where.size} did not find the others: {reason}"
        fix = "All ranks must start within 5 minutes, and reach MASTER_ADDR over the network."
        raise BuildError(Finding(what, fix)) from error


def _store(where: Place, until: float) -> Any:
    """Return torch's store of the launch: the launcher's own, or one that rank 0 holds."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    holds = where.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    # Short waits, because signals are not received meanwhile.
    short = timedelta(seconds=_SHORT)
    while True:
        try:
            return TCPStore(*address, where.size, holds, timeout=short, wait_for_workers=False)
        except RuntimeError:
            if holds or time.monotonic() > until:
                raise


def _welcome(store: Any, where: Place, until: float) -> dict[int, Link]:
    """Let all other ranks connect, and nobody else."""
    token, links = secrets.token_hex(), dict[int, Link]()
    with _listening(where) as server:
        store.set("moeforge", json.dumps([server.getsockname()[1], token]))
        while len(links) < where.size - 1:
            server.settimeout(max(0.1, until - time.monotonic()))
            try:
                peer, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, where.size)) - links.keys())
                raise OSError(f"rank {', '.join(map(str, missing))} did not come") from None
            link = Link(peer)
            with suppress(OSError, ValueError):
                hello = link.read()
                if secrets.compare_digest(str(hello.get("token")), token):
                    links[int(hello["rank"])] = link
                    link.send(welcome=True)
                    continue
            link.close()
    return links


def _listening(where: Place) -> socket.socket:
    if where.local_size == where.size:
        return socket.create_server(("127.0.0.1", 0), backlog=where.size)
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", 0), family=socket.AF_INET6, backlog=where.size, dualstack_ipv6=True
        )
    return socket.create_server(("", 0), backlog=where.size)


def _greet(store: Any, where: Place, until: float) -> Link:
    """Connect to rank 0."""
    host = "127.0.0.1" if where.local_size == where.size else os.environ["MASTER_ADDR"]
    while True:
        while not store.check(["moeforge"]):
            if time.monotonic() > until:
                raise OSError("rank 0 did not come")
            time.sleep(_POLL)
        port, token = json.loads(store.get("moeforge"))
        try:
            link = Link(socket.create_connection((host, port), SILENCE))
            link.send(rank=where.rank, token=token)
            link.read()
            return link
        except (OSError, ValueError):
            # Where a launcher starts its ranks anew, that may be the door of the one before.
            if time.monotonic() > until:
                raise
            time.sleep(_RETRY)


__all__ = ["Group", "Place", "joined", "leads", "place", "remark"]

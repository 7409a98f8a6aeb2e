"""Owns how the ranks of a launch share the weights files of one build: which rank makes which.

Rank 0 leads: it alone knows the journal, and tells the others when to begin and what is left.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from moeforge import engine
from moeforge.engine import Settings
from moeforge.errors import BuildError, Finding
from moeforge.output.journal import ROUTERS as ROUTERS_FILE
from moeforge.output.journal import Journal, disk_finding
from moeforge.output.layout import Shard
from moeforge.plans import ROUTERS, Plan
from moeforge.ranks import Group
from moeforge.routers import unpacked
from moeforge.sealed import Sealed

_TOKEN = "launch"
"""File of the work folder by which ranks see that it is the same for all."""


def divide(shards: Sequence[Shard], ranks: int) -> list[list[Shard]]:
    """Return which of `shards` each rank makes, so that their bytes are about equal."""
    parts: list[list[Shard]] = [[] for _ in range(ranks)]
    sizes = [0] * ranks
    for shard in sorted(shards, key=lambda shard: (-shard.nbytes, shard.name)):
        least = sizes.index(min(sizes))
        parts[least].append(shard)
        sizes[least] += shard.nbytes
    # In the order of the output, in which inputs are read from front to back.
    return [sorted(part, key=lambda shard: shard.name) for part in parts]


def agree(group: Group, identity: str) -> None:
    """See that all ranks would make the same bytes; rank 0 waits for the plans of all.

    Args:
        group: the ranks.
        identity: fingerprint of the build, as this rank sees it.

    Raises:
        BuildError: another rank's is not that of rank 0.
    """
    if group.rank:
        group.tell(identity=identity)
        return
    found = group.wait("identity")
    if others := [str(rank) for rank, other in sorted(found.items()) if other != identity]:
        what = f"rank {', '.join(others)} would not make the same bytes as rank 0"
        fix = (
            "All ranks must run the same command, with the same versions of moeforge, torch and "
            "transformers, on the same files: on a shared file system, or from the Hub."
        )
        raise BuildError(Finding(what, fix))


def lead(
    group: Group,
    plan: Plan,
    shards: Sequence[Shard],
    journal: Journal,
    settings: Settings,
    progress: Callable[[int], None],
    compiling: Callable[[int, int], None],
    note: Callable[[Finding], None],
) -> dict[str, Sealed]:
    """Write the shards of `plan` together with the other ranks; of rank 0.

    Args:
        group: the ranks.
        plan: what to make; its router source exists.
        shards: all of them.
        journal: of the build; the others get its router weights from there.
        settings: how this rank works.
        progress: called with the bytes that all ranks have written.
        compiling: told where arithmetic is compiled for the first time, which all ranks do then.
        note: told where there is nothing to do for some.

    Returns:
        What is known of every shard, by name.

    Raises:
        BuildError: as `engine.run`, or another rank is lost or has failed.
    """
    token, theirs = secrets.token_hex(), dict[str, Sealed]()
    (journal.root / _TOKEN).write_text(token, encoding="ascii")
    left = [shard for shard in shards if shard.name not in journal.kept]
    mine = [shard for shard in shards if shard.name in journal.kept]
    mine += divide(left, group.size)[0]
    if left and len(left) < group.size:
        files = f"{len(left)} weights file{'s' if len(left) > 1 else ''}"
        what = f"{group.size} ranks, {files} to make: the other ranks wait"
        note(Finding(what, "A smaller --shard-size gives work to more of them."))

    def heard(entry: tuple[str, str, int]) -> None:
        name, seal = entry[0], Sealed(*entry[1:])
        theirs[name] = seal
        journal.add(name, seal)

    def told(done: int) -> None:
        group.check()
        group.written = done
        waited()

    def waited() -> None:
        progress(group.written + sum(group.said("written").values()))

    group.listen("sealed", heard)
    group.tell(go=[str(journal.root), token, [shard.name for shard in left]])
    own = engine.run(
        *(plan, tuple(mine), journal.folder, settings, told),
        kept=journal.kept,
        sealed=journal.add,
        compiling=compiling,
    )
    group.wait("finished", waited)
    waited()  # what they wrote last came with that
    return {**own, **theirs}


def follow(group: Group, plan: Plan, shards: Sequence[Shard], settings: Settings) -> None:
    """Write this rank's part of the shards of `plan`, and wait for the end; not of rank 0.

    Args:
        group: the ranks.
        plan: what to make; the source of router weights comes from rank 0.
        shards: all of them.
        settings: how this rank works.

    Raises:
        BuildError: as `engine.run`, or rank 0 is lost or has ended the build.
    """
    folder, token, left = group.wait("go")[0]
    root = Path(folder)
    _refuse_elsewhere(root, token)
    if plan.experts:
        source = unpacked((root / ROUTERS_FILE).read_bytes()).source
        plan = replace(plan, sources={**plan.sources, ROUTERS: source})
    mine = divide([shard for shard in shards if shard.name in left], group.size)[group.rank]

    def told(done: int) -> None:
        group.check()
        group.written = done

    def sealed(name: str, seal: Sealed) -> None:
        group.tell(sealed=[name, seal.blake3, seal.nbytes])

    try:
        if mine:
            engine.run(plan, tuple(mine), root / "model", settings, told, sealed=sealed)
    except OSError as error:
        raise BuildError(disk_finding(error, root)) from error
    group.tell(written=group.written, finished=True)
    group.wait("end")


def _refuse_elsewhere(root: Path, token: str) -> None:
    """Refuse to work in a folder that is not that of rank 0."""
    try:
        same = (root / _TOKEN).read_text(encoding="ascii") == token
    except OSError:
        same = False
    if not same:
        what = f"{root}, where rank 0 makes the output, is not the same folder here"
        fix = "Choose an output with -o on a file system that all ranks share, under the same path."
        raise BuildError(Finding(what, fix))

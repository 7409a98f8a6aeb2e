"""Owns what vouches for a finished build: its lock file, and the checks that it has to pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moeforge.errors import BuildError, Finding
from moeforge.output.lock import Made, write_lock
from moeforge.plans import ROUTERS, Plan
from moeforge.prepare import Prepared
from moeforge.proof.verify import Verified, verify
from moeforge.sealed import Sealed

_INTERPRETER = 700_000_000
"""Bytes that the process that loads the model takes beside it."""


@dataclass(frozen=True)
class Asked:
    """What the caller of a build wants of it, and what bears on its bytes.

    Attributes:
        device: torch device of the arithmetic.
        shard_size: most bytes of tensors per file.
        memory: bytes that may be taken; None for no limit.
        verify: check the output before it is published.
        hash_inputs: read inputs on this machine whole for their hashes.
    """

    device: str
    shard_size: int
    memory: int | None
    verify: bool
    hash_inputs: bool


def vouch(
    prepared: Prepared,
    plan: Plan,
    work: Path,
    asked: Asked,
    sealed: Mapping[str, Sealed],
    progress: Callable[[str, int, int], None],
    note: Callable[[Finding], None],
) -> Verified | None:
    """Write the lock file of the build in `work`, and check everything that can be checked.

    Args:
        prepared: the recipe.
        plan: how it was made, with the source of its router weights.
        work: the output, complete.
        asked: what is wanted.
        sealed: weights files that have not changed since the engine hashed them.
        progress: told what is done.
        note: told what was not checked, and what inputs lack.

    Raises:
        BuildError: a check failed; the output must not be published.
    """
    loaded = prepared.loaded
    made = Made(
        loaded.stem,
        loaded.document.text,
        loaded.document.data,
        loaded.find,
        asked.device,
        asked.shard_size,
        plan.sources.get(ROUTERS),
    )
    write_lock(work, plan, made, sealed, hash_inputs=asked.hash_inputs)
    if not asked.verify:
        return None
    # What is not a mixture is mapped, and takes no memory of its own.
    held = plan.nbytes + _INTERPRETER if plan.experts else 0
    cramped = asked.memory is not None and held > asked.memory
    found = verify(
        work,
        forward=False if cramped else None,
        sealed=sealed,
        inherited=_inherits(plan),
        progress=lambda done, total: progress("verify", done, total),
    )
    if not found.ok:
        fix = "Nothing was published; --no-verify publishes it as it is."
        raise BuildError(*found.errors, Finding("the output did not pass its checks", fix))
    for finding in found.notes:
        note(finding)
    return found


def _inherits(plan: Plan) -> bool:
    """Say whether the output has the tensors of its donor, by name, and no others.

    What transformers misses or does not read is then a matter of the donor.
    """
    return plan.kind == "merge" and {t.name for t in plan.tensors} == plan.donor.specs().keys()

"""Owns what is known of a file that is finished: the engine finds it out, others rely on it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sealed:
    """A weights file that is on the disk, all of whose values are finite.

    Attributes:
        blake3: hash of all its bytes, in hexadecimal.
        nbytes: its size.
    """

    blake3: str
    nbytes: int

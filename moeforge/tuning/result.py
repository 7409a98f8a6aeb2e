"""Owns what a finished tuning says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moeforge.recipe.tuning import Tuning
from moeforge.tuning.train import Step


@dataclass(frozen=True)
class Tuned:
    """A finished tuning.

    Attributes:
        folder: where the model is.
        labels: names of the experts; empty where they are not known.
        start: held-out loss before, in nats per predicted token.
        best: after; `start` where nothing was better.
        step: number of the step that was kept; 0 where the routers are as they were.
        steps_done: how many there were.
        load: share of the choices that each expert got on held-out text, before and after.
        documents: how many were trained on, and how many were held out.
        teachers: for each teacher, of how many documents it was the best; empty without teachers.
        settings: as given.
        seed: as given.
        learning_rate: the peak.
        routers: names of the changed tensors on disk.
        unchanged: BLAKE3 of everything else in each weights file, the same before and after.
        history: every step.
        seconds: wall-clock time.
    """

    folder: Path
    labels: tuple[str, ...]
    start: float
    best: float
    step: int
    steps_done: int
    load: tuple[tuple[float, ...], tuple[float, ...]]
    documents: tuple[int, int]
    teachers: Mapping[str, int]
    settings: Tuning
    seed: int
    learning_rate: float
    routers: tuple[str, ...]
    unchanged: Mapping[str, str]
    history: tuple[Step, ...]
    seconds: float

"""Owns what a tuning looks like: a line while it runs, then a table, JSON or Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moeforge.markdown import plain
from moeforge.tables import short_labels

if TYPE_CHECKING:
    from rich.table import Table

    from moeforge.tuning.result import Tuned
    from moeforge.tuning.train import Step


def step_line(step: Step, best: float | None = None) -> str:
    """Return a step for the end of a progress bar: loss, held-out loss, and load per expert.

    Args:
        step: what was reported.
        best: the lowest held-out loss so far, shown where the step has none of its own.
    """
    heldout = best if step.heldout is None else step.heldout
    parts = [f"loss {step.loss:.3f}"] if step.number else []
    parts += [f"held out {heldout:.4f}"] if heldout is not None else []
    return ", ".join([*parts, f"load {percent(step.load)}"])


def percent(shares: Sequence[float]) -> str:
    """Return shares as `26/24/25/25 %`."""
    return "/".join(f"{share:.0%}"[:-1] for share in shares) + " %"


def verdict(tuned: Tuned) -> str:
    """Return in a sentence what came of it."""
    if not tuned.step:
        return (
            f"nothing tried was better on held-out text than the start, {tuned.start:.4f} nats per "
            "token: the routers are as they were"
        )
    gained = f"{tuned.best - tuned.start:+.4f}"
    return (
        f"held-out loss {tuned.start:.4f} → {tuned.best:.4f} nats per token "
        f"({gained}), the best of {tuned.steps_done} steps after {tuned.step}"
    )


def tuned_json(tuned: Tuned) -> dict[str, Any]:
    """Return a tuning as plain data."""
    return {
        "folder": str(tuned.folder),
        "improved": bool(tuned.step),
        "heldout": {"before": tuned.start, "after": tuned.best},
        "best_step": tuned.step,
        "steps": tuned.steps_done,
        "seconds": round(tuned.seconds, 2),
        "documents": {"training": tuned.documents[0], "heldout": tuned.documents[1]},
        "load": {"before": list(tuned.load[0]), "after": list(tuned.load[1])},
        "teachers": dict(tuned.teachers),
        "settings": tuned.settings.model_dump(mode="json"),
        "seed": tuned.seed,
        "learning_rate": tuned.learning_rate,
        "routers": list(tuned.routers),
        "unchanged_blake3": dict(tuned.unchanged),
        "history": [
            {"step": step.number, "loss": step.loss, "heldout": step.heldout, "load": [*step.load]}
            for step in tuned.history
        ],
    }


def tuned_table(tuned: Tuned) -> Table:
    """Return a tuning as a table for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(verdict(tuned)), title_justify="left", title_style="")
    table.add_column("")
    for name in ("held-out loss", *_labels(tuned)):
        table.add_column(escape(name), justify="right")
    for name, loss, load in _rows(tuned):
        table.add_row(escape(name), loss, *load)
    return table


def tuned_markdown(tuned: Tuned) -> str:
    """Return a tuning as a sentence and a Markdown table, for the model card."""
    names = ("load on held-out text", "nats/token", *map(plain, _labels(tuned)))
    lines = [f"| {' | '.join(names)} |", "|---|" + "---:|" * (len(names) - 1)]
    lines += [f"| {name} | {loss} | {' | '.join(load)} |" for name, loss, load in _rows(tuned)]
    how = "by matching the best dense expert of each document" if tuned.settings.teach else ""
    how = f"{how}, " if how else ""
    said = verdict(tuned)
    return (
        f"The routers were trained, {how}everything else frozen: {said}. "
        f"{tuned.documents[0]} documents, learning rate {tuned.learning_rate:.2g}, "
        f"seed {tuned.seed}.\n\n" + "\n".join(lines)
    )


def _labels(tuned: Tuned) -> Sequence[str]:
    return short_labels(tuple(tuned.labels)) or [
        f"expert {number}" for number in range(len(tuned.load[0]))
    ]


def _rows(tuned: Tuned) -> list[tuple[str, str, list[str]]]:
    losses = (tuned.start, tuned.best)
    return [
        (name, f"{loss:.4f}", [f"{share:.1%}" for share in load])
        for name, loss, load in zip(("before", "after"), losses, tuned.load, strict=True)
    ]

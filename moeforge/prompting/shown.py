"""Owns what selections, clusters and overlaps look like, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from moeforge.prompting import piles
from moeforge.prompting.clusters import Clustering
from moeforge.prompting.overlap import TOLD_APART, Overlap
from moeforge.prompting.selection import Kept
from moeforge.recipe import Prompt

_WIDTH = 60


def _excerpt(prompt: Prompt) -> str:
    text = " ".join(piles.text_of(prompt)[: 10 * _WIDTH].split())
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def selection_json(kept: Sequence[Kept]) -> list[dict[str, Any]]:
    """Return a selection as plain data."""
    return [
        {
            "label": each.label,
            "kept": len(each.prompts),
            "candidates": each.candidates,
            "left_out": each.left_out,
            "distinctness": _mean(each.distinct),
        }
        for each in kept
    ]


def selection_table(kept: Sequence[Kept]) -> Table:
    """Return a selection as a table."""
    table = Table()
    table.add_column("prompts")
    for name in ("kept", "of", "repeated or blank", "distinctness"):
        table.add_column(name, justify="right")
    for each in kept:
        counts = (str(n) for n in (len(each.prompts), each.candidates, each.left_out))
        table.add_row(escape(each.label), *counts, _number(_mean(each.distinct)))
    return table


def overlap_json(found: Overlap) -> dict[str, Any]:
    """Return an overlap as plain data."""
    return {
        "experts": list(found.labels),
        "prompts": list(found.prompts),
        "accuracy": [list(row) for row in found.accuracy],
        "threshold": TOLD_APART,
    }


def overlap_table(found: Overlap) -> Table:
    """Return an overlap as a matrix; what cannot be told apart is bold."""
    table = Table(title="told apart by a linear probe (1: always, 0.5: not at all)")
    table.add_column("prompts of")
    for number, _ in enumerate(found.labels):
        table.add_column(str(number), justify="right")
    for number, (label, row) in enumerate(zip(found.labels, found.accuracy, strict=True)):
        low = [value is not None and value < TOLD_APART for value in row]
        cells = [
            f"[bold]{_number(value)}[/]" if bad else _number(value)
            for value, bad in zip(row, low, strict=True)
        ]
        table.add_row(f"{number} {escape(label)}", *cells)
    return table


def clusters_json(found: Clustering) -> dict[str, Any]:
    """Return a clustering as plain data."""
    return {
        "left_out": found.left_out,
        "experts": [
            {
                "expert": name,
                "file": f"{label}.jsonl",
                "texts": len(cluster.prompts),
                "nats_per_byte": dict(zip(found.experts, cluster.losses, strict=True)),
                "central": piles.text_of(cluster.central),
            }
            for name, label, cluster in zip(
                found.experts, found.labels, found.clusters, strict=True
            )
        ],
    }


def clusters_table(found: Clustering) -> Table:
    """Return a clustering as a table: losses of all experts, each cluster's least in bold."""
    table = Table(title="nats per byte of each expert (columns) on each expert's texts")
    for name in ("expert", "file", "texts"):
        table.add_column(name, justify="right" if name == "texts" else "left")
    for number, _ in enumerate(found.experts):
        table.add_column(str(number), justify="right")
    table.add_column("most central text")
    for number, (label, cluster) in enumerate(zip(found.labels, found.clusters, strict=True)):
        best = min(cluster.losses)
        cells = [
            f"[bold]{loss:.3f}[/]" if loss == best else f"{loss:.3f}" for loss in cluster.losses
        ]
        name, file = escape(f"{number} {found.experts[number]}"), escape(f"{label}.jsonl")
        excerpt = escape(_excerpt(cluster.central))
        table.add_row(name, file, str(len(cluster.prompts)), *cells, excerpt)
    return table

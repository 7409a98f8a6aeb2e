"""Owns what models compared on text look like, as tables and as JSON."""

from __future__ import annotations

import math
from typing import Any

from rich.markup import escape
from rich.table import Table

from moeforge.proof.perplexity import Comparison, Measured, Score
from moeforge.tables import short_labels

_METRICS = (
    ("loss", "Loss, nats per token", "{:.3f}"),
    ("perplexity", "Perplexity", "{:,.2f}"),
    ("bits_per_byte", "Bits per byte", "{:.3f}"),
)
"""Attribute of scores, what it is called, and how it is written."""
_PER_TOKEN = ("loss", "perplexity")


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as plain data; a perplexity that no float can hold is null."""
    return {
        "window": comparison.window,
        "same_tokens": comparison.same_tokens,
        "models": [
            {
                "model": each.model,
                "dtype": each.dtype,
                "streamed": each.streamed,
                "texts": {
                    str(path): {
                        **_metrics(score),
                        "tokens": score.tokens,
                        "bytes": score.nbytes,
                    }
                    for path, score in zip(comparison.texts, each.scores, strict=True)
                },
                "mean": _metrics(each),
            }
            for each in comparison.models
        ],
        "notes": [note.as_data() for note in comparison.notes],
    }


def _metrics(scored: Score | Measured) -> dict[str, float | None]:
    values = {name: getattr(scored, name) for name, _, _ in _METRICS}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def comparison_tables(comparison: Comparison) -> list[str | Table]:
    """Return a comparison as headings and tables, one for each metric.

    The best model of each column is bold. Where models cut the texts into different tokens,
    none is in metrics per token, and their headings say why.
    """
    labels = short_labels(tuple(each.model for each in comparison.models))
    files = short_labels(tuple(map(str, comparison.texts)))
    shown: list[str | Table] = []
    for name, title, form in _METRICS:
        compared = comparison.same_tokens or name not in _PER_TOKEN
        why = "lower is better" if compared else "not comparable: the models' tokens differ"
        table = Table()
        table.add_column("model")
        for file in [*files, *(["mean"] if len(files) > 1 else [])]:
            table.add_column(escape(file), justify="right")
        rows = [_row(each, name) for each in comparison.models]
        best = [min(column) for column in zip(*rows, strict=True)]
        for label, row in zip(labels, rows, strict=True):
            cells = [
                f"[bold]{form.format(value)}[/]"
                if compared and len(rows) > 1 and value == lowest
                else form.format(value)
                for value, lowest in zip(row, best, strict=True)
            ]
            table.add_row(escape(label), *cells)
        shown += [f"\n{title} ({why})", table]
    return shown


def _row(measured: Measured, metric: str) -> list[float]:
    values = [getattr(score, metric) for score in measured.scores]
    return [*values, getattr(measured, metric)] if len(values) > 1 else values

"""Owns the heat map of a comparison: layers × kinds of tensors."""

from __future__ import annotations

import math
from pathlib import Path

from moeforge.proof.diff import OUTSIDE, Difference, together

_LABELS = 40
"""Labels along an axis, at most."""


def draw(found: Difference, path: Path) -> None:
    """Write the heat map as a PNG to `path`: colour is log10 of ‖A - B‖ / ‖A‖.

    Cells without two tensors to compare are white, those that are equal have the lowest colour.
    What is outside of layers is in the title.

    Raises:
        OSError: the file cannot be written.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = [layer for layer in found.layers if layer != OUTSIDE] or [OUTSIDE]
    kinds = found.kinds or tuple(sorted({t.kind for t in found.tensors}))
    value_LK = np.full((len(layers), len(kinds)), np.nan)
    for row, layer in enumerate(layers):
        for column, kind in enumerate(kinds):
            sums = [t.sums for t in found.of(layer, kind) if t.sums]
            if sums:
                value_LK[row, column] = together(sums).relative
    positive = value_LK[np.isfinite(value_LK) & (value_LK > 0)]
    low = math.floor(math.log10(positive.min())) if positive.size else -8
    high = max(math.ceil(math.log10(positive.max())), low + 1) if positive.size else 0
    with np.errstate(divide="ignore", invalid="ignore"):
        shown_LK = np.where(value_LK == 0, low, np.log10(value_LK))
    figure = Figure(
        figsize=(2.5 + 0.4 * min(len(kinds), _LABELS), 2.2 + 0.22 * min(len(layers), _LABELS)),
        dpi=150,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(shown_LK, aspect="auto", cmap="viridis", vmin=low, vmax=high)
    rows = range(0, len(layers), math.ceil(len(layers) / _LABELS))
    columns = range(0, len(kinds), math.ceil(len(kinds) / _LABELS))
    axes.set_yticks(list(rows), [layers[row] for row in rows], fontsize=8)
    axes.set_xticks(
        list(columns),
        [kinds[column].replace("$", r"\$") for column in columns],
        fontsize=8,
        rotation=45,
        ha="right",
        rotation_mode="anchor",
    )
    axes.set_ylabel("layer", fontsize=8)
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("log10 ‖A - B‖ / ‖A‖", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    names = f"A: {found.a}\nB: {found.b}".replace("$", r"\$")
    figure.suptitle(names, fontsize=8, x=0.01, ha="left")
    figure.savefig(path, metadata={"Software": "moeforge"})

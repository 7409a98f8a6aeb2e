"""Owns the heat map of a comparison: layers × kinds of tensors."""

from __future__ import annotations

import math
from pathlib import Path

from moeforge.proof.diff import OUTSIDE, Difference, together
from moeforge.proof.plots import plain

_LABELS = 40
"""Labels along an axis, at most."""
_EQUAL = "0.85"
"""Colour of cells without a difference: a light grey, which the scale does not have."""
_ODD = "tab:red"


def draw(found: Difference, path: Path) -> None:
    """Write the heat map as a PNG to `path`: colour is ‖A - B‖ / ‖A‖, on a logarithmic scale.

    Cells whose tensors are equal are grey, those with values that are not finite red, those without
    two tensors to compare white. What is outside of layers is not drawn where there are layers. The
    same comparison gives the same bytes.

    Raises:
        OSError: the file cannot be written.
    """
    with plain():
        _draw(found, path)


def _draw(found: Difference, path: Path) -> None:
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    layers = [layer for layer in found.layers if layer != OUTSIDE] or [OUTSIDE]
    kinds = found.kinds or tuple(sorted({t.kind for t in found.tensors}))
    value_LK = np.full((len(layers), len(kinds)), np.nan)
    for row, layer in enumerate(layers):
        for column, kind in enumerate(kinds):
            sums = [t.sums for t in found.of(layer, kind) if t.sums]
            if sums:
                relative = together(sums).relative
                value_LK[row, column] = relative if math.isfinite(relative) else math.inf
    positive = value_LK[np.isfinite(value_LK) & (value_LK > 0)]
    low = 10.0 ** math.floor(math.log10(positive.min())) if positive.size else 1e-8
    high = max(10.0 ** math.ceil(math.log10(positive.max())), 10 * low) if positive.size else 1.0
    figure = Figure(
        figsize=(2.5 + 0.4 * min(len(kinds), _LABELS), 2.2 + 0.22 * min(len(layers), _LABELS)),
        dpi=150,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    key = []
    for mark, colour, label in ((0.0, _EQUAL, "equal"), (math.inf, _ODD, "not finite")):
        if (value_LK == mark).any():
            where_LK = np.where(value_LK == mark, 0.0, np.nan)
            axes.imshow(where_LK, aspect="auto", cmap=ListedColormap([colour]))
            key.append(Patch(color=colour, label=label))
    different_LK = np.where((value_LK > 0) & np.isfinite(value_LK), value_LK, np.nan)
    image = axes.imshow(different_LK, aspect="auto", cmap="viridis", norm=LogNorm(low, high))
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
    bar.set_label("‖A - B‖ / ‖A‖", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    if key:
        axes.legend(
            handles=key,
            fontsize=8,
            loc="lower right",
            bbox_to_anchor=(1, 1),
            frameon=False,
            ncols=len(key),
        )
    names = f"A: {found.a}\nB: {found.b}".replace("$", r"\$")
    figure.suptitle(names, fontsize=8, x=0.01, ha="left")
    figure.savefig(path, metadata={"Software": "moeforge"})

"""Owns the heat map of a routing report: layers × experts, one panel for each domain."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeforge.proof.plots import plain
from moeforge.proof.route_report import RouteReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moeforge.proof.route_report import Floats

PANELS = 12
"""Panels, at most: all tokens, and the first domains. The report's JSON has them all."""
_ACROSS = 3
_TICKS = 16
"""Labels along an axis, at most."""
_LONG = 12
"""Characters of a label that stands upright; longer ones are tilted."""


def draw(report: RouteReport, path: Path) -> None:
    """Write the heat map as a PNG to `path`.

    Colour is the share of router weight that an expert gets in a layer; all panels have the same
    scale, from zero to the largest share. The same report gives the same bytes, whatever the
    user's settings of matplotlib.

    Raises:
        OSError: the file cannot be written.
    """
    with plain():
        _draw(report, path)


def _draw(report: RouteReport, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: list[tuple[str, Floats]] = [("all tokens", report.weight_LE())]
    by_domain = report.weight_LDE()
    panels += [(domain.name, by_domain[:, d]) for d, domain in enumerate(report.domains)]
    left_out, panels = len(panels[PANELS:]), panels[:PANELS]
    layers, experts = panels[0][1].shape
    across = 2 if len(panels) == 4 else min(len(panels), _ACROSS)
    down = math.ceil(len(panels) / across)
    wide = min(5.0, max(2.2, 0.52 * experts if experts <= _TICKS else 0.07 * experts))
    high = min(5.0, max(1.1, 0.26 * layers if layers <= _TICKS else 0.09 * layers))
    tilted = max(map(len, report.experts)) > _LONG or experts > 4
    figure = Figure(
        figsize=(across * (wide + 0.5) + 1.2, down * (high + 0.75) + 0.6),
        dpi=150,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, across, squeeze=False)
    top = max(float(share_LE.max()) for _, share_LE in panels)
    image: Any = None
    for place, axes in enumerate(grid.flat):
        if place >= len(panels):
            axes.set_axis_off()
            continue
        title, share_LE = panels[place]
        image = axes.imshow(share_LE, aspect="auto", cmap="viridis", vmin=0, vmax=top)
        axes.set_title(_shortened(title, 40), fontsize=9, loc="left")
        lowest = place + across >= len(panels)
        _label(axes, report, tilted=tilted, named=lowest, numbered=place % across == 0)
        if layers * experts <= 64:
            _write(axes, share_LE, top)
    bar = figure.colorbar(image, ax=grid, shrink=min(1.0, 2.2 / (down * high)), pad=0.02)
    bar.ax.set_title("share of\nweight", fontsize=8, loc="left")
    bar.ax.axhline(report.even, color="white", linewidth=1)
    bar.ax.set_xlabel("line:\neven", fontsize=8, loc="left")
    bar.ax.tick_params(labelsize=8)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    note = f"; {left_out} more domains are not shown" if left_out else ""
    heading = f"Where tokens go: {_shortened(report.model, 60)}{note}"
    figure.suptitle(heading, fontsize=10, x=0.01, ha="left")
    figure.savefig(path, metadata={"Software": "moeforge"})


def _label(axes: Axes, report: RouteReport, *, tilted: bool, named: bool, numbered: bool) -> None:
    """Write the numbers of layers and the labels of experts along a panel."""
    layers, experts = len(report.layers), len(report.experts)
    rows = range(0, layers, math.ceil(layers / _TICKS))
    columns = range(0, experts, math.ceil(experts / _TICKS))
    axes.tick_params(length=0, labelsize=8)
    for edge in axes.spines.values():
        edge.set_visible(False)
    axes.set_yticks(list(rows), [str(report.layers[row]) for row in rows] if numbered else [])
    if numbered:
        axes.set_ylabel("layer", fontsize=8)
    labels = [_shortened(report.experts[column], 24) for column in columns]
    plain = all(label.isdigit() for label in labels)
    turned: Any = (
        {} if plain or not tilted else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    )
    axes.set_xticks(list(columns), labels if named else [], **turned)
    if named and plain:
        axes.set_xlabel("expert", fontsize=8)


def _write(axes: Axes, share_LE: Floats, top: float) -> None:
    """Write each share into its cell, in a colour that can be read on it."""
    for layer, row in enumerate(share_LE):
        for expert, share in enumerate(row):
            colour = "black" if share > 0.6 * top else "white"
            axes.text(
                expert,
                layer,
                f"{100 * share:.0f}",
                ha="center",
                va="center",
                fontsize=7,
                color=colour,
            )


def _shortened(text: str, most: int) -> str:
    # A dollar would begin a formula.
    text = text.replace("$", r"\$")
    return text if len(text) <= most else "…" + text[1 - most :]

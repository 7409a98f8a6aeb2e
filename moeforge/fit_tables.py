"""Owns what fitted routers look like, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from moeforge.gates import LayerFit
from moeforge.plans import Experts
from moeforge.tables import short_labels


def fits_json(fits: Sequence[LayerFit], experts: Experts) -> list[dict[str, Any]]:
    """Return what is known of fitted routers as plain data, by layer; no held-out loss is null."""
    return [
        {
            "layer": layer,
            "regularization": fit.regularization,
            "temperature": fit.temperature,
            "held_out_loss": None if math.isnan(fit.loss) else fit.loss,
            "fitted_load": dict(zip(experts.labels, fit.fitted_load, strict=True)),
            "load": dict(zip(experts.labels, fit.load, strict=True)),
        }
        for layer, fit in zip(experts.layers, fits, strict=True)
    ]


def fits_table(fits: Sequence[LayerFit], experts: Experts) -> Table:
    """Return the fit of each layer and the load of its experts; arrows where it was calibrated."""
    table = Table(title="Fitted routers, and the load of experts on the calibration prompts")
    for column in ("layer", "λ", "temperature", "held-out loss", *short_labels(experts.labels)):
        table.add_column(escape(column), justify="right")
    for layer, fit in zip(experts.layers, fits, strict=True):
        loads = [
            f"{after:.0%}" if before == after else f"{before:.0%} → {after:.0%}"
            for before, after in zip(fit.fitted_load, fit.load, strict=True)
        ]
        loss = "none" if math.isnan(fit.loss) else f"{fit.loss:.3f}"
        numbers = (f"{fit.regularization:g}", f"{fit.temperature:.3g}", loss)
        table.add_row(str(layer), *numbers, *loads)
    return table

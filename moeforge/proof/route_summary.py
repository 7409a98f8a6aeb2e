"""Owns the short form of a routing report: a row for each expert, and warnings.

A build shows it at its end and in the model card; `route_tables` has the long form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moeforge.errors import Finding
from moeforge.markdown import plain
from moeforge.proof.route_report import DEAD, RouteReport

if TYPE_CHECKING:
    from rich.table import Table

_ROWS = 16
"""Experts that have a row each; of more, the least and the most loaded."""
_NAMED = 6
"""Layers that a warning names; more are counted."""


def _title(report: RouteReport) -> str:
    what = "the experts' prompts" if report.mapping == "given" else "texts"
    alike = ", domains alike" if len(report.domains) > 1 else ""
    return f"Where {what} go: {report.tokens} tokens{alike}, mean over layers"


def _columns(report: RouteReport) -> list[str]:
    own = ["own tokens first"] if report.mapping == "given" else []
    return ["expert", "load", "in layers", "weight", *own]


def _rows(report: RouteReport) -> list[list[str]]:
    """Return label, load, its range over layers, weight, and how many of its own tokens come first.

    Load is the share of choices; all but the range are means over layers.
    """
    load_LE, weight_E = report.load_LE(), report.weight_LE().mean(0)
    accuracy_D = report.accuracy_LD().mean(0)
    own = {e: accuracy_D[d] for d, domain in enumerate(report.domains) for e in domain.experts}
    rows = []
    for number in _shown(load_LE.mean(0).tolist()):
        load_L = load_LE[:, number]
        cells = [
            report.experts[number],
            f"{load_L.mean():.0%}",
            f"{load_L.min():.0%} to {load_L.max():.0%}",
            f"{weight_E[number]:.0%}",
        ]
        if report.mapping == "given":
            cells.append(f"{own[number]:.0%}" if number in own else "—")
        rows.append(cells)
    return rows


def _shown(load: Sequence[float]) -> list[int]:
    """Return the numbers of the experts that have a row, in their order."""
    if len(load) <= _ROWS:
        return list(range(len(load)))
    ranked = sorted(range(len(load)), key=lambda number: load[number])
    return sorted(ranked[: _ROWS // 2] + ranked[-_ROWS // 2 :])


def _remarks(report: RouteReport) -> str:
    """Return the router's certainty in words, and whether an expert stands out."""
    entropy, confidence = report.entropy_L().mean(), report.confidence_L().mean()
    words = [] if entropy != entropy else [f"router entropy {entropy:.2f} (1 is even)"]
    words.append(f"mean weight of the first choice {confidence:.2f}")
    text = ", ".join(words)
    left_out = len(report.experts) - _ROWS
    parts = [f"{text[0].upper()}{text[1:]}."]
    parts += [f"{left_out} experts between these are not shown."] if left_out > 0 else []
    found = _standing_out(report)
    parts += [f"{what[0].upper()}{what[1:]}." for what, _ in found]
    if report.dead() is None:
        parts.append("Too few tokens to call an expert dead.")
    elif not found:
        parts.append("No expert is dead, none dominates.")
    return " ".join(parts)


def as_parts(report: RouteReport) -> list[str | Table]:
    """Return a heading, a table and a sentence for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    first, *others = _columns(report)
    table.add_column(first)
    for column in others:
        table.add_column(column, justify="right")
    for label, *cells in _rows(report):
        table.add_row(escape(label), *cells)
    return [f"\n{_title(report)}", table, escape(_remarks(report))]


def as_markdown(report: RouteReport, picture: str) -> str:
    """Return the same for a model card, with the heat map in file `picture`."""
    columns = _columns(report)
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for cells in _rows(report):
        lines.append(f"| {' | '.join(map(plain, cells))} |")
    parts = [
        f"![Share of router weight by layer and expert]({picture})",
        f"{_title(report)}.",
        "\n".join(lines),
        plain(_remarks(report)),
    ]
    return "\n\n".join(parts)


def warnings(report: RouteReport, *, fitted: bool) -> list[Finding]:
    """Return a warning for each expert that hardly any token reaches, or nearly all do.

    Args:
        report: as measured.
        fitted: the gate mode is `fitted`, which can balance the load.
    """
    better = "Set gate_parameters: {balance: 0.5}" if fitted else "Take gate_mode: fitted"
    fixes = {
        "dead": f"{better}, give it prompts of what it is for, or train the routers with tune:.",
        "dominating": f"{better}, or train the routers with tune: {{balance: 0.01}}.",
    }
    return [Finding(what, fixes[kind], warning=True) for what, kind in _standing_out(report)]


def _standing_out(report: RouteReport) -> list[tuple[str, str]]:
    """Return what is said of each dead or dominating expert, and which of the two it is."""
    dead = report.dead() or ((),) * len(report.layers)
    said = (
        (dead, "dead", f"it gets less than {DEAD:.0%} of an even share of router weight"),
        (report.dominating(), "dominating", "it gets far more router weight than an even share"),
    )
    found = []
    for by_layer, kind, why in said:
        for number, label in enumerate(report.experts):
            pairs = zip(report.layers, by_layer, strict=True)
            layers = [layer for layer, experts in pairs if number in experts]
            if layers:
                found.append(
                    (f"expert {label} is {kind} in {_places(report, layers)}: {why}", kind)
                )
    return found


def _places(report: RouteReport, layers: Sequence[int]) -> str:
    if len(layers) == len(report.layers):
        return "every layer that has experts"
    named = f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers[:_NAMED]))}"
    if len(layers) > _NAMED:
        named += f" and {len(layers) - _NAMED} others"
    return f"{named} of {len(report.layers)}"

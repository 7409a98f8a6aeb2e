"""Owns what a routing report looks like in a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from moeforge.proof.route_report import DEAD, DOMINATING, RouteReport, names

_WIDE = 8
"""Experts whose loads have a column each; of more, a table shows the least and the most loaded."""

_MAPPINGS = {
    "given": "as given",
    "order": "by order: as many files as experts, so file i is taken for expert i's",
    "best": "found: the best one-to-one assignment on these tokens, which flatters the router",
}


def mapping_words(report: RouteReport) -> str:
    """Return in words which expert is right for which domain, and who says so."""
    text = f"Experts of domains: {_MAPPINGS[report.mapping]}"
    if report.mapping == "best":
        per_layer = len(set(report.owners)) > 1
        if per_layer:
            return f"{text}; it differs between layers (JSON lists it)."
        owners = report.owners[0]
    else:
        owners = tuple(domain.experts for domain in report.domains)
    pairs = [
        f"{domain.name} → {names(report, experts)}"
        for domain, experts in zip(report.domains, owners, strict=True)
        if experts
    ]
    return f"{text}: {'; '.join(pairs)}."


def remarks(report: RouteReport) -> list[str]:
    """Return what stands out, in sentences."""
    found = []
    dead = report.dead()
    if dead is None:
        found.append("Too few tokens to call an expert dead: give more prompts.")
    for what, layers, why in (
        (
            "dead",
            dead or [()] * len(report.layers),
            f"less than {DEAD:.0%} of an even share of weight",
        ),
        ("dominating", report.dominating(), f"over {DOMINATING} even shares or near all weight"),
    ):
        places = [
            f"layer {layer}: {names(report, experts)}"
            for layer, experts in zip(report.layers, layers, strict=True)
            if experts
        ]
        if places:
            found.append(f"{what.capitalize()} experts ({why}): {'; '.join(places)}.")
    if dead is not None and len(found) == 0:
        found.append("No expert is dead, none dominates.")
    cut = sum(domain.cut for domain in report.domains)
    if cut:
        found.append(f"{cut} prompts are longer than the model takes; what is beyond was left out.")
    return found


def as_data(report: RouteReport) -> dict[str, Any]:
    """Return a report as plain data; shares are of 1, rounded to six digits."""
    dead = report.dead()
    accuracy = report.accuracy_LD()
    weight_LDE, load, weight = report.weight_LDE(), report.load_LE(), report.weight_LE()
    return {
        "model": report.model,
        "model_type": report.model_type,
        "experts": list(report.experts),
        "per_token": report.per_token,
        "mapping": report.mapping,
        "thresholds": {"dead": DEAD, "dominating": DOMINATING},
        "domains": [
            {
                "name": domain.name,
                "prompts": domain.prompts,
                "tokens": domain.tokens,
                "prompts_cut": domain.cut,
                "accuracy": _number(accuracy[:, d].mean()),
            }
            for d, domain in enumerate(report.domains)
        ],
        "layers": [
            {
                "layer": number,
                "load": _numbers(load[i]),
                "weight": _numbers(weight[i]),
                "entropy": _number(report.entropy_L()[i]),
                "confidence": _number(report.confidence_L()[i]),
                "dead": None if dead is None else list(dead[i]),
                "dominating": list(report.dominating()[i]),
                "domains": {
                    domain.name: {
                        "weight": _numbers(weight_LDE[i, d]),
                        "accuracy": _number(accuracy[i, d]),
                        "experts": list(report.owners[i][d]),
                    }
                    for d, domain in enumerate(report.domains)
                },
            }
            for i, number in enumerate(report.layers)
        ],
    }


def _number(value: float) -> float | None:
    return None if value != value else round(float(value), 6)  # JSON has no NaN


def _numbers(values: Sequence[float]) -> list[float | None]:
    return [_number(value) for value in values]


def as_tables(report: RouteReport) -> list[str | Table]:
    """Return a report as headings, tables and sentences, for a terminal."""
    shown: list[str | Table] = [
        escape(
            f"{report.model}: {report.model_type}, {len(report.experts)} experts, "
            f"{report.per_token} per token; {report.tokens} tokens of {len(report.domains)} domains"
        ),
        "\nLoad of experts by layer: share of choices / share of weight",
        _loads(report),
        "\nShare of tokens whose first choice is right for their domain",
        _accuracies(report),
        escape(mapping_words(report)),
        *map(escape, remarks(report)),
    ]
    return shown


def _loads(report: RouteReport) -> Table:
    table = Table()
    table.add_column("layer", justify="right")
    few = len(report.experts) <= _WIDE
    for label in report.experts if few else ("least loaded", "most loaded"):
        table.add_column(escape(label), justify="right")
    table.add_column("entropy", justify="right")
    table.add_column("confidence", justify="right")
    load, weight = report.load_LE(), report.weight_LE()
    dead, dominating = report.dead(), report.dominating()
    for i, number in enumerate(report.layers):
        marked = {*(dead[i] if dead else ()), *dominating[i]}
        cells = [f"{c:.0%} / {w:.0%}" for c, w in zip(load[i], weight[i], strict=True)]
        cells = [f"[bold]{cell}[/]" if e in marked else cell for e, cell in enumerate(cells)]
        if not few:
            ends = (int(weight[i].argmin()), int(weight[i].argmax()))
            cells = [f"{escape(report.experts[e])}: {cells[e]}" for e in ends]
        entropy = report.entropy_L()[i]
        cells.append("—" if entropy != entropy else f"{entropy:.2f}")
        table.add_row(str(number), *cells, f"{report.confidence_L()[i]:.2f}")
    return table


def _accuracies(report: RouteReport) -> Table:
    import numpy as np

    table = Table()
    table.add_column("layer", justify="right")
    for domain in report.domains:
        table.add_column(escape(domain.name), justify="right")
    table.add_column("mean", justify="right")
    accuracy = report.accuracy_LD()
    known = accuracy[:, ~np.isnan(accuracy).any(0)]
    mean_L = known.mean(1) if known.size else np.full(len(accuracy), np.nan)
    for number, row, mean in zip(report.layers, accuracy, mean_L, strict=True):
        table.add_row(str(number), *(_percent(value) for value in (*row, mean)))
    columns = accuracy.mean(0)
    overall = mean_L.mean()
    table.add_row("mean", *(_percent(value) for value in (*columns, overall)), style="bold")
    return table


def _percent(value: float) -> str:
    return "—" if value != value else f"{value:.0%}"

"""Owns the page on which the tokens of prompts are coloured by expert, layer by layer.

One file without anything from outside; it is complete without its few lines of script, which only
hide layers. Whatever comes from a user is escaped.
"""

from __future__ import annotations

from html import escape

from moeforge.proof.route_report import RouteReport, Sample
from moeforge.proof.route_tables import mapping_words, remarks

_HUES = (212, 28, 142, 322, 265, 58, 182, 0)
"""Of the first experts, far from each other; those of more follow the golden angle."""
_GOLDEN = 137.508
_NAMED = 4
"""Experts of a token whose weights its title names; of more, the rest is added up."""

_STYLE = """
:root { color-scheme: light dark; --s: 80%; --l: 84%; --ink: #1b1b1f; --paper: #fdfdfc;
  --quiet: #666a70; --line: #d9d9de;
  --edge: #fff9; }
@media (prefers-color-scheme: dark) {
  :root { --s: 42%; --l: 27%; --ink: #e8e8ea; --paper: #17181b; --quiet: #a0a3aa; --line: #3a3b41;
    --edge: #0006; }
}
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .25rem; overflow-wrap: anywhere; }
h3 { font-size: .85rem; margin: 1rem 0 .25rem; color: var(--quiet); font-weight: 600; }
p { margin: .25rem 0; overflow-wrap: anywhere; }
.quiet { color: var(--quiet); font-size: .9rem; }
.bar { position: sticky; top: 0; padding: .6rem 0; background: var(--paper);
  border-bottom: 1px solid var(--line); z-index: 1; max-height: 40vh; overflow: auto; }
.bar span { display: inline-block; margin: .1rem .3rem .1rem 0; padding: 0 .45rem;
  border-radius: 4px; font-size: .9rem; }
.bar label { float: right; font-size: .9rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .9rem; display: block;
  overflow-x: auto; }
th, td { padding: .15rem .8rem .15rem 0; text-align: right; font-variant-numeric: tabular-nums; }
td.over { text-align: left; }
th { color: var(--quiet); font-weight: 600; border-bottom: 1px solid var(--line); }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4;
  font: 14px/1.75 ui-monospace, "DejaVu Sans Mono", monospace; }
[class^="e"] { background: hsl(var(--h) var(--s) var(--l)); }
pre i { font-style: normal; padding: .12em 0; box-shadow: inset 1px 0 var(--edge); }
pre i[data-n]::before { content: attr(data-n); font-size: .6em; vertical-align: .55em;
  opacity: .75; padding: 0 .15em; }
pre i:hover { outline: 2px solid var(--ink); }
"""

_SCRIPT = """
const pick = document.querySelector("select");
pick.closest("label").hidden = false;
pick.onchange = () => {
  for (const part of document.querySelectorAll("[data-layer]"))
    part.hidden = pick.value !== "" && part.dataset.layer !== pick.value;
};
"""


def render(report: RouteReport) -> str:
    """Return the page: a summary, and every sample of the report."""
    title = f"Where tokens go: {report.model}"
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}{_colours(len(report.experts))}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *(f"<p>{escape(sentence)}</p>" for sentence in _summary(report)),
        _table(report),
        _bar(report),
        *(
            _section(report, sample, number)
            for number, sample in zip(_numbers(report.samples), report.samples, strict=True)
        ),
        f"<script>{_SCRIPT}</script></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _colours(experts: int) -> str:
    hues = [_HUES[e] if experts <= len(_HUES) else (e * _GOLDEN) % 360 for e in range(experts)]
    return "\n".join(f".e{number} {{ --h: {hue:.0f}; }}" for number, hue in enumerate(hues))


def _summary(report: RouteReport) -> list[str]:
    return [
        f"{report.model_type}, {len(report.experts)} experts, {report.per_token} per token, "
        f"{len(report.layers)} layers with a router; {report.tokens} tokens of "
        f"{len(report.domains)} domains were read. A token has the colour of its first choice, "
        "the expert with the largest weight; a small number stands where that changes. The pointer "
        "on a token shows the weights.",
        mapping_words(report),
        *remarks(report),
    ]


def _table(report: RouteReport) -> str:
    """Return what was measured in each layer."""
    heads = ["layer", "entropy", "confidence", *(domain.name for domain in report.domains)]
    rows = []
    measured = zip(
        report.layers,
        report.entropy_L(),
        report.confidence_L(),
        report.accuracy_LD(),
        strict=True,
    )
    for layer, entropy, confidence, accuracies in measured:
        cells = [str(layer), "—" if entropy != entropy else f"{entropy:.2f}", f"{confidence:.2f}"]
        cells += ["—" if share != share else f"{share:.0%}" for share in accuracies]
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    over = f'<td colspan="3"></td><td colspan="{len(report.domains)}" class="quiet over">'
    over += "tokens whose first choice is right for their domain</td>"
    return f"<table><tr>{over}</tr><tr>{head}</tr>{body}</table>"


def _bar(report: RouteReport) -> str:
    """Return the legend, and the choice of layers that the script brings to life."""
    options = "".join(f'<option value="{layer}">{layer}</option>' for layer in report.layers)
    chips = "".join(
        f'<span class="e{number}">{number if label == str(number) else f"{number} {escape(label)}"}'
        "</span>"
        for number, label in enumerate(report.experts)
    )
    choice = f'<label hidden>layer <select><option value="">all</option>{options}</select></label>'
    return f'<div class="bar">{choice}{chips}</div>'


def _numbers(samples: tuple[Sample, ...]) -> list[int]:
    """Return of each sample which one of its domain it is, from 1."""
    return [
        1 + sum(before.domain == sample.domain for before in samples[:place])
        for place, sample in enumerate(samples)
    ]


def _section(report: RouteReport, sample: Sample, number: int) -> str:
    shown = len(sample.pieces)
    amount = f"{shown} tokens"
    if shown < sample.tokens:
        amount = f"The first {shown} of {sample.tokens} tokens; the rest is left out of this page."
    parts = [
        f"<section><h2>{escape(sample.domain)}, prompt {number}</h2>",
        f'<p class="quiet">{amount}</p>',
    ]
    for place, layer in enumerate(report.layers):
        tokens = _tokens(report, sample, place)
        parts.append(f'<div data-layer="{layer}"><h3>layer {layer}</h3><pre>{tokens}</pre></div>')
    return "\n".join([*parts, "</section>"])


def _tokens(report: RouteReport, sample: Sample, place: int) -> str:
    before, parts = -1, []
    chosen_TK, weights_TK = sample.chosen_LTK[place].tolist(), sample.weights_LTK[place].tolist()
    for piece, chosen, weights in zip(sample.pieces, chosen_TK, weights_TK, strict=True):
        first = chosen[0]
        mark = f' data-n="{first}"' if first != before else ""
        title = escape(_title(report, chosen, weights))
        text = escape(piece).replace("\n", "⏎\n")
        parts.append(f'<i class="e{first}"{mark} title="{title}">{text}</i>')
        before = first
    return "".join(parts)


def _title(report: RouteReport, chosen: list[int], weights: list[float]) -> str:
    named = [
        f"{report.experts[expert]} {weight:.2f}"
        for expert, weight in zip(chosen[:_NAMED], weights, strict=False)
    ]
    if len(chosen) > _NAMED:
        named.append(f"{len(chosen) - _NAMED} more {sum(weights[_NAMED:]):.2f}")
    return ", ".join(named)

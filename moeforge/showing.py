"""Owns what results look like for people: the parts that commands print and notebooks show."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import singledispatch
from typing import Any

from rich.markup import escape

from moeforge.checking import Report
from moeforge.errors import Finding
from moeforge.forge import Result
from moeforge.markdown import amount
from moeforge.plans import Plan
from moeforge.proof.diff import Difference
from moeforge.proof.verify.checks import FAILED, Verified
from moeforge.rebuilding import Rebuilt
from moeforge.shown import show_size

_PAGE = (
    '<pre style="white-space:pre;overflow-x:auto;line-height:normal;'
    "font-family:Menlo,'DejaVu Sans Mono',consolas,'Courier New',monospace\">{code}</pre>"
)
_COLUMNS = 120


def html(result: Any) -> str:
    """Return the parts of a result as HTML for a notebook."""
    from rich.console import Console

    console = Console(
        record=True, file=io.StringIO(), width=_COLUMNS, force_jupyter=False, highlight=False
    )
    for part in parts(result):
        console.print(part)
    return console.export_html(code_format=_PAGE, inline_styles=True)


@singledispatch
def line(result: Any) -> str:
    """Return a result in one line, without markup."""
    raise TypeError(f"nobody knows how {type(result).__name__} looks")


@singledispatch
def parts(result: Any) -> Iterator[Any]:
    """Yield texts, with rich's markup, and tables."""
    raise TypeError(f"nobody knows how {type(result).__name__} looks")


def told(findings: tuple[Finding, ...]) -> Iterator[str]:
    """Yield what is worth knowing, a line each."""
    for finding in findings:
        yield escape(f"{'warning' if finding.warning else 'note'}: {finding}")


def _model(plan: Plan) -> str:
    active = f" ({amount(plan.active_parameters)} active)" if plan.experts else ""
    name = (plan.config.get("architectures") or ["unknown"])[0]
    return f"{name}, {amount(plan.parameters)} parameters{active}, {show_size(plan.nbytes)}"


@line.register
def _(plan: Plan) -> str:
    return f"{plan.kind}: {_model(plan)}, {len(plan.tensors)} tensors"


@parts.register
def _(plan: Plan) -> Iterator[Any]:
    yield f"[bold]{plan.kind}[/]: {escape(_model(plan))}, {len(plan.tensors)} tensors"
    yield escape(f"reads {show_size(plan.bytes_read)} from {', '.join(plan.sources)}")
    if plan.experts:
        e = plan.experts
        yield escape(f"{len(e.labels)} experts, {e.per_token} per token: {', '.join(e.labels)}")
    yield from told(plan.notes)


@line.register
def _(result: Result) -> str:
    return f"{result.folder}: {_model(result.plan)}, made in {result.seconds:.1f} s"


@parts.register
def _(result: Result) -> Iterator[Any]:
    yield from built(result)
    yield from told(result.notes)


def built(result: Result, *, verbose: bool = False) -> Iterator[Any]:
    """Yield what a build came to, without its notes.

    Args:
        result: the build.
        verbose: with everything that was measured.
    """
    plan = result.plan
    yield (
        f"[bold]{escape(str(result.folder))}[/]: {escape(_model(plan))}, "
        f"made in {result.seconds:.1f} s"
    )
    if verbose:
        copied = f"{show_size(plan.bytes_copied)} copied as they are"
        yield f"{len(plan.tensors)} tensors, {show_size(plan.bytes_read)} read, {copied}"
    if verbose and result.fits and plan.experts:
        from moeforge.fit_tables import fits_table

        yield fits_table(result.fits, plan.experts)
    if result.tuned:
        from moeforge.tuning.tables import tuned_table

        yield "\nRouters trained"
        yield tuned_table(result.tuned)
    if result.heldout:
        from moeforge.tables import heldout_tables

        yield from heldout_tables(result.heldout)
    if result.routing:
        from moeforge.proof.route_summary import as_parts
        from moeforge.proof.route_tables import as_tables

        yield from as_tables(result.routing) if verbose else as_parts(result.routing)


@line.register
def _(report: Report) -> str:
    if report.errors:
        return f"{len(report.errors)} wrong: {report.errors[0].what}"
    warnings = sum(note.warning for note in report.notes)
    return f"fine, {warnings} warnings" if warnings else "fine"


@parts.register
def _(report: Report) -> Iterator[Any]:
    from moeforge.checking.compatibility import comparison_table
    from moeforge.checking.needs import needs_table
    from moeforge.tables import short_labels

    for finding in report.errors:
        yield f"[red]{escape(f'error: {finding}')}[/]"
    yield from told(report.notes)
    if report.compared and report.compared.differs:
        yield comparison_table(report.compared, short_labels(report.compared.labels))
    if report.needs:
        yield needs_table(report.needs)
    if not report.errors:
        yield "fine"


@line.register
def _(found: Verified) -> str:
    failed = [check.name for check in found.checks if check.state == FAILED]
    return f"{found.folder}: {'failed: ' + ', '.join(failed) if failed else 'ok'}"


@parts.register
def _(found: Verified) -> Iterator[Any]:
    from moeforge.proof_tables import checks_table

    yield checks_table(found)
    for finding in found.errors:
        yield f"[red]{escape(f'error: {finding}')}[/]"
    yield from told(tuple(note for note in found.notes if note.warning))


@line.register
def _(found: Difference) -> str:
    different = sum(not tensor.equal for tensor in found.tensors)
    said = f"{different} of {len(found.tensors)} tensors differ" if different else "the same"
    return f"{found.a} and {found.b}: {said}"


@parts.register
def _(found: Difference) -> Iterator[Any]:
    from moeforge.proof_tables import diff_tables

    yield from diff_tables(found)


@line.register
def _(made: Rebuilt) -> str:
    said = f"{len(made.differing)} files have other bytes" if made.differing else "the same bytes"
    return f"{made.result.folder}: {said}"


@parts.register
def _(made: Rebuilt) -> Iterator[Any]:
    yield escape(line(made))
    yield from map(escape, made.differing)
    yield from parts(made.result)

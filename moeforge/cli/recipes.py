"""Owns the commands about recipes: build, check, plan."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeforge import ranks
from moeforge.cli.shared import (
    Device,
    Json,
    NoVerify,
    Offline,
    Out,
    Overwrite,
    Private,
    RecipeArgument,
    Strict,
    Threads,
    built_json,
    check_device,
    findings_json,
    note,
    parse_size,
    print_json,
    print_parts,
    reporting,
    showing_progress,
    watched,
)

if TYPE_CHECKING:
    from moeforge.forge import Report, Result


def build(
    recipe: RecipeArgument,
    out: Out = None,
    device: Device = "cpu",
    threads: Threads = None,
    memory: Annotated[str | None, typer.Option(help="Most memory to take, such as 2GB.")] = None,
    shard_size: Annotated[str, typer.Option(help="Most bytes per output file.")] = "5GB",
    overwrite: Overwrite = False,
    strict: Strict = False,
    evict: Annotated[
        bool, typer.Option("--evict", help="Remove downloads of this build when they are used up.")
    ] = False,
    offline: Offline = False,
    no_verify: NoVerify = False,
    hash_inputs: Annotated[
        bool, typer.Option("--hash-inputs", help="Hash local weights whole for the lock file.")
    ] = False,
    push: Annotated[
        str | None,
        typer.Option("--push", metavar="REPO", help="Then upload it to owner/name on the Hub."),
    ] = None,
    private: Private = None,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Print what is done.")] = False,
) -> None:
    """Build the model of a recipe."""
    leads = ranks.leads()  # of several processes the first speaks for all
    as_json, quiet = as_json and leads, quiet or not leads
    with reporting(as_json=as_json), ranks.joined() as group:
        from moeforge import forge
        from moeforge.cli.push import pushed, refuse_push

        if leads:
            refuse_push(push, private=private, no_verify=no_verify, offline=offline)
        if (odd := ranks.remark()) and not quiet:
            note(odd)
        limit, per_file = parse_size(memory) if memory else None, parse_size(shard_size)
        check_device(device)
        shown = not quiet and watched(as_json=as_json)
        with showing_progress(shown=shown) as progress:
            result = forge.build(
                recipe,
                out,
                device=device,
                threads=threads,
                memory=limit,
                shard_size=per_file,
                overwrite=overwrite,
                strict=strict,
                evict=evict,
                offline=offline,
                verify=not no_verify,
                hash_inputs=hash_inputs,
                group=group,
                progress=progress,
                note=note if not quiet else lambda finding: None,
            )
        if not as_json and not quiet:
            _show_result(result, verbose=verbose)
        sent = pushed(result.folder, push, private, shown=shown) if push and leads else None
        if as_json:
            print_json({**_result_json(result), **({"push": sent.as_data()} if sent else {})})
        elif sent:
            print(sent.url)


def _result_json(result: Result) -> dict[str, Any]:
    plan, heldout = result.plan, result.heldout
    data = {**built_json(result), "notes": findings_json(result.notes)}
    if result.fits and plan.experts:
        from moeforge.fit_tables import fits_json

        data["fits"] = fits_json(result.fits, plan.experts)
    if result.tuned:
        from moeforge.tuning.tables import tuned_json

        data["tuned"] = tuned_json(result.tuned)
    if heldout:
        data["held_out"] = {
            "domains": heldout.domains,
            "tokens": heldout.tokens,
            "losses": heldout.losses,
            "experts": heldout.experts,
            "routing": heldout.routing,
        }
    if result.routing:
        from moeforge.proof.route_tables import as_data

        data["routing"] = as_data(result.routing)
    return data


def _show_result(result: Result, *, verbose: bool) -> None:
    from rich.console import Console

    from moeforge.showing import built

    console = Console(highlight=False)
    heading, *parts = built(result, verbose=verbose)
    console.print(heading, soft_wrap=True)
    for part in parts:
        console.print(part)


def check(
    recipe: RecipeArgument,
    out: Out = None,
    target: Annotated[
        str | None,
        typer.Option(help="Engine to read the output: transformers4, vllm, llama.cpp or mlx."),
    ] = None,
    device: Device = "cpu",
    strict: Strict = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say what each tensor is made of, with all values.")
    ] = False,
    prompts: Annotated[
        bool, typer.Option("--prompts", help="Say how well the experts' prompts can be told apart.")
    ] = False,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Say what stands against building a recipe; reads no weights and writes nothing."""
    with reporting(as_json=as_json):
        from moeforge import forge

        check_device(device)
        report = forge.check(
            recipe, out, target=target, device=device, strict=strict, offline=offline
        )
        overlap = _overlap(recipe, offline=offline, as_json=as_json) if prompts else {}
        if as_json:
            print_json({**_report_json(report, explain=explain), **overlap})
        else:
            _show_report(report, recipe, explain=explain)
        raise typer.Exit(report.exit_code)


def _report_json(report: Report, *, explain: bool) -> dict[str, Any]:
    from moeforge.checking.compatibility import comparison_json
    from moeforge.checking.explain import explained
    from moeforge.checking.needs import needs_json

    experts = report.plan.experts if report.plan else None
    padding = report.prepared.padding if report.prepared else None
    data = {
        "errors": findings_json(report.errors),
        "notes": findings_json(report.notes),
        "architectures": dict(experts.considered) if experts else {},
        "models": comparison_json(report.compared) if report.compared else None,
        "padding": vars(padding) if padding else None,
        "needs": needs_json(report.needs) if report.needs else None,
    }
    if explain and report.prepared:
        data["explained"] = explained(report.prepared.plan, report.prepared.loaded.recipe)
    return data


def _show_report(report: Report, recipe: Path, *, explain: bool) -> None:
    from moeforge.checking.compatibility import comparison_table
    from moeforge.checking.explain import explained, explained_tables
    from moeforge.checking.needs import needs_table
    from moeforge.tables import short_labels

    for finding in report.errors:
        print(f"error: {finding}", file=sys.stderr)
    for finding in report.notes:
        note(finding)
    if report.compared and report.compared.differs:
        print_parts(comparison_table(report.compared, short_labels(report.compared.labels)))
    if report.plan and report.plan.experts:
        for name, why in report.plan.experts.considered:
            print(f"architecture {name}: {why}")
    padded = report.prepared.padding if report.prepared else None
    if padded and padded.rows > padded.tokens:
        print(
            f"embeddings of {padded.model}: {padded.rows} rows for {padded.tokens} tokens; "
            f"{padded.rows - padded.tokens} padding rows are kept as they are"
        )
    if explain and report.prepared:
        data = explained(report.prepared.plan, report.prepared.loaded.recipe)
        print_parts(*explained_tables(data))
    if report.needs:
        print_parts(needs_table(report.needs))
    if not report.errors:
        print(f"{recipe}: fine; `moeforge plan {recipe}` says what would be made")


def _overlap(recipe: Path, *, offline: bool, as_json: bool) -> dict[str, Any]:
    """Compare the prompts of the experts; show the matrix, or return it as plain data."""
    from moeforge.prompting import overlap_of
    from moeforge.prompting.shown import overlap_json, overlap_table

    with showing_progress(shown=watched(as_json=as_json)) as progress:
        found, findings = overlap_of(recipe, offline=offline, progress=progress)
    if as_json:
        return {"prompts": {**overlap_json(found), "notes": findings_json(findings)}}
    print_parts(overlap_table(found))
    for finding in findings:
        note(finding)
    return {}


def plan(
    recipe: RecipeArgument,
    trace: Annotated[
        str | None,
        typer.Option(
            metavar="TENSOR", help="Say where an output tensor comes from; * and ? match."
        ),
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Most bytes per output file.")] = "5GB",
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Print what a build would make, read, write and need."""
    with reporting(as_json=as_json):
        from moeforge.checking.origins import traced, trees
        from moeforge.prepare import prepare
        from moeforge.tables import describe, plan_table

        prepared = prepare(recipe, offline=offline)
        if trace is not None:
            found = traced(prepared.plan, trace)
            if as_json:
                print_json(found)
            else:
                print_parts(*trees(found))
            return
        described = describe(prepared, parse_size(shard_size))
        if as_json:
            print_json(described)
            return
        print_parts(plan_table(prepared.plan, described))

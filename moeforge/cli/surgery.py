"""Owns the commands that take mixtures apart and make them anew: extract, experts, upcycle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeforge.cli.shared import (
    Device,
    Json,
    NoVerify,
    Offline,
    Overwrite,
    Threads,
    built_json,
    check_device,
    note,
    print_json,
    print_parts,
    reporting,
    showing_progress,
    watched,
)

if TYPE_CHECKING:
    from moeforge.forge import Result

_Mixture = Annotated[str, typer.Argument(metavar="MOE", help="A mixture: folder or Hub id.")]
_Out = Annotated[Path, typer.Option("-o", "--out", help="Output folder.", show_default=False)]
_DType = Annotated[str | None, typer.Option(help="Dtype of the result (default: as it is stored).")]
_TopK = Annotated[int | None, typer.Option("--top-k", min=1, help="Experts for each token.")]


def extract(
    model: _Mixture,
    out: _Out,
    expert: Annotated[int | None, typer.Option(min=0, help="Whose MLPs it gets, from 0.")] = None,
    average: Annotated[bool, typer.Option("--average", help="Average all experts.")] = False,
    as_type: Annotated[
        str | None, typer.Option("--as", metavar="TYPE", help="Model type, such as mistral.")
    ] = None,
    dtype: _DType = None,
    device: Device = "cpu",
    threads: Threads = None,
    overwrite: Overwrite = False,
    offline: Offline = False,
    no_verify: NoVerify = False,
    as_json: Json = False,
) -> None:
    """Take a dense model out of a mixture of experts."""
    with reporting(as_json=as_json):
        from moeforge import surgery

        def act(settings: dict[str, Any]) -> Result:
            return surgery.extract(
                model, out, expert=expert, average=average, as_type=as_type, dtype=dtype, **settings
            )

        _run(act, device, threads, overwrite, offline, no_verify, as_json)


def experts(
    model: _Mixture,
    out: _Out,
    keep: Annotated[str | None, typer.Option(help="Experts that stay: 0,2,3.")] = None,
    drop: Annotated[str | None, typer.Option(help="Experts that go: 1,4.")] = None,
    duplicate: Annotated[str | None, typer.Option(help="Experts to have once more: 0.")] = None,
    keep_most: Annotated[
        int | None, typer.Option(min=1, help="Keep as many in each layer, those used most.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option("--text", help="Text that says so; may be repeated.")
    ] = None,
    add: Annotated[
        list[str] | None, typer.Option("--add", help="Dense model to add; may be repeated.")
    ] = None,
    refit: Annotated[
        Path | None, typer.Option(help="Prompts to fit the routers on (.txt, .jsonl).")
    ] = None,
    top_k: _TopK = None,
    dtype: _DType = None,
    device: Device = "cpu",
    threads: Threads = None,
    overwrite: Overwrite = False,
    offline: Offline = False,
    no_verify: NoVerify = False,
    as_json: Json = False,
) -> None:
    """Keep, drop, duplicate or add experts of a mixture, or keep those that a text uses most."""
    with reporting(as_json=as_json):
        from moeforge import surgery

        def act(settings: dict[str, Any]) -> Result:
            return surgery.experts(
                model,
                out,
                keep=_numbers(keep),
                drop=_numbers(drop),
                duplicate=_numbers(duplicate),
                keep_most=keep_most,
                text=text or (),
                add=add or (),
                refit=refit,
                top_k=top_k,
                dtype=dtype,
                **settings,
            )

        _run(act, device, threads, overwrite, offline, no_verify, as_json)


def upcycle(
    model: Annotated[str, typer.Argument(metavar="DENSE", help="Folder or Hub id.")],
    out: _Out,
    count: Annotated[int, typer.Option("--experts", min=1, help="Number of copies.")] = 8,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Experts for each token.")] = 2,
    noise: Annotated[
        float, typer.Option(min=0.0, help="Standard deviation of noise on each copy's weights.")
    ] = 0.0,
    gate: Annotated[str, typer.Option(help="random, uniform_random or zeros.")] = "random",
    seed: Annotated[int, typer.Option(min=0, help="Of noise and routers.")] = 0,
    architecture: Annotated[str, typer.Option(help="MoE family, or auto.")] = "auto",
    dtype: _DType = None,
    device: Device = "cpu",
    threads: Threads = None,
    overwrite: Overwrite = False,
    offline: Offline = False,
    no_verify: NoVerify = False,
    as_json: Json = False,
) -> None:
    """Make a mixture of copies of one dense model, to be trained on."""
    with reporting(as_json=as_json):
        from moeforge import surgery

        def act(settings: dict[str, Any]) -> Result:
            return surgery.upcycle(
                model,
                out,
                experts=count,
                top_k=top_k,
                noise=noise,
                gate=gate,
                seed=seed,
                architecture=architecture,
                dtype=dtype,
                **settings,
            )

        _run(act, device, threads, overwrite, offline, no_verify, as_json)


def _numbers(text: str | None) -> list[int]:
    """Return the numbers of a list such as 0,2,3."""
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of experts such as 0,2,3") from None


def _run(
    act: Callable[[dict[str, Any]], Result],
    device: str,
    threads: int | None,
    overwrite: bool,
    offline: bool,
    no_verify: bool,
    as_json: bool,
) -> None:
    """Do it with progress, and say what was made."""
    from moeforge.markdown import amount

    check_device(device)
    with showing_progress(shown=watched(as_json=as_json)) as progress:
        settings = {
            "device": device,
            "threads": threads,
            "overwrite": overwrite,
            "offline": offline,
            "verify": not no_verify,
            "progress": progress,
            "note": note,
        }
        result = act(settings)
    plan = result.plan
    architecture = str((plan.config.get("architectures") or ["model"])[0])
    if as_json:
        print_json({**built_json(result), "architecture": architecture})
        return
    from rich.markup import escape

    told = f"[bold]{escape(str(result.folder))}[/]: {escape(architecture)}"
    parts = [f"{told}, {amount(plan.parameters)} parameters"]
    if plan.active_parameters != plan.parameters:
        parts.append(f"{amount(plan.active_parameters)} active")
    print_parts(", ".join(parts))

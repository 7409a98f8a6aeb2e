"""Owns routing reports of checkpoints: opening one, which file is whose, and whether it fits.

Knows folders, the Hub and free memory; leaves the counting to `proof.route`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeforge.errors import BuildError, Finding
from moeforge.forward import quiet
from moeforge.gates._tokenize import load_tokenizer
from moeforge.proof.route import Domain, Progress, experts_of, measure
from moeforge.proof.route_report import Mapping, RouteReport
from moeforge.recipe import prompts
from moeforge.sources import Source, open_source

if TYPE_CHECKING:
    from torch import nn

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""What a model may be run in; "auto" is what it is stored in, as users run it."""
SHORT_PART = 0.25
"""A build looks at its routing only where the result in float32 takes less than this part of the
memory that is free: a second look at the build's end must not push anything else out."""
SHORT_TOKENS = 2000
"""Tokens of each domain that a build looks at."""
_FILLS = 0.8
"""Part of free memory that weights may take; the rest is for what is computed."""


def route(
    model: str,
    files: Sequence[Path],
    experts: Sequence[str] = (),
    *,
    revision: str | None = None,
    offline: bool = False,
    code: bool = False,
    device: str = "cpu",
    dtype: str = "auto",
    progress: Progress = lambda done, total: None,
) -> RouteReport:
    """Say where a mixture sends the tokens of prompts.

    The files are the domains. Which expert is right for a domain is said by `experts`; else, where
    there are as many files as experts, file i is expert i's; else the best one-to-one assignment of
    each layer is taken, and the report says so.

    A mixture that does not fit into free memory is run with its layers coming from disk.

    Args:
        model: folder or Hub id of a mixture in transformers' form.
        files: prompts, `.txt` or `.jsonl` as in recipes.
        experts: `NAME=FILE` for each expert in order; or `NUMBER=FILE` for some of them.
        revision: branch, tag or commit on the Hub.
        offline: use only what is in the local Hub cache.
        code: run the program text that comes with the checkpoint.
        device: torch device.
        dtype: one of `DTYPES`.
        progress: told the prompts done and all of them.

    Raises:
        SourceError: the model or its tokenizer cannot be used.
        HubError: the Hub refused or could not be reached.
        BuildError: a prompts file, the mapping or the kind of model is not what it must be.
    """
    if dtype not in DTYPES:
        raise BuildError(Finding(f"unknown dtype {dtype}", f"Known: {', '.join(DTYPES)}."))
    named = [_named(entry) for entry in experts]
    domains = _read([*files, *(file for _, file in named)])
    source = open_source(model, revision, offline=offline)
    folder = _folder(source)
    tokenizer = load_tokenizer(folder)
    count = experts_of(_without_weights(folder, source, code=code))
    labels, whose, mapping = _mapping(named, list(domains), count)
    read = [
        Domain(domain.name, domain.prompts, tuple(whose.get(file, ())))
        for file, domain in domains.items()
    ]
    with ExitStack() as stack:
        loaded = _load(source, stack, code=code, device=device, dtype=dtype)
        return measure(loaded, tokenizer, read, mapping, labels, name=model, progress=progress)


def short(
    folder: Path,
    domains: Sequence[Domain],
    labels: Sequence[str],
    *,
    name: str,
    code: bool = False,
    model: nn.Module | None = None,
    progress: Progress = lambda done, total: None,
) -> RouteReport | Finding:
    """Return the routing of a mixture that has just been built, or why it was not looked at.

    At most 2000 tokens of each domain are read, and a prompt's rest.

    Args:
        folder: the result, with its tokenizer.
        domains: texts and, where they are known, their own experts.
        labels: of the experts.
        name: of the model.
        code: run the program text in the folder; for what the same build has written.
        model: the result, where it is in memory already.
        progress: told the prompts done and all of them.

    Raises:
        BuildError: transformers cannot load the result.
    """
    source = open_source(str(folder.absolute()))
    if model is None:
        needed, free = 4 * sum(spec.numel for spec in source.specs().values()), _free_memory()
        if needed > SHORT_PART * free:
            what = "where tokens go was not measured: in float32 the result takes "
            what += f"{needed / 1e9:.1f} GB, more than a quarter of {free / 1e9:.1f} GB free memory"
            return Finding(what, f"Run it: moeforge route {name} --prompts FILE…")
    with ExitStack() as stack:
        if model is None:
            model = _load(source, stack, code=code, device="cpu", dtype="auto")
        return measure(
            model,
            load_tokenizer(folder),
            domains,
            "given" if any(domain.experts for domain in domains) else "best",
            labels,
            name=name,
            most=SHORT_TOKENS,
            progress=progress,
        )


def _named(entry: str) -> tuple[str, Path]:
    name, equals, file = entry.partition("=")
    if not (name and equals and file):
        what = f"{entry!r} does not say whose a prompts file is"
        raise BuildError(Finding(what, "Write NAME=FILE, for example python=prompts/python.txt."))
    return name, Path(file)


def _read(files: Sequence[Path]) -> dict[Path, Domain]:
    """Return the domains by file, each file once."""
    found: dict[Path, Domain] = {}
    wrong = []
    stems = [file.stem for file in dict.fromkeys(files)]
    for file in dict.fromkeys(files):
        name = file.stem if stems.count(file.stem) == 1 else str(file)
        try:
            found[file] = Domain(name, prompts.load(file))
        except ValueError as error:
            wrong.append(Finding(str(error)))
    if wrong:
        raise BuildError(*wrong)
    if not found:
        raise BuildError(Finding("there are no prompts to send", "Give one or more files."))
    return found


def _mapping(
    named: Sequence[tuple[str, Path]], files: Sequence[Path], count: int
) -> tuple[list[str], dict[Path, list[int]], Mapping]:
    """Return the experts' labels, the numbers of each file's experts, and whence they are."""
    numbers = [str(number) for number in range(count)]
    if not named:
        if len(files) != count:
            return numbers, {}, "best"
        return numbers, {file: [number] for number, file in enumerate(files)}, "order"
    given = [name for name, _ in named]
    twice = sorted({name for name in given if given.count(name) > 1})
    if twice:
        what = f"expert {twice[0]} is given {given.count(twice[0])} times"
        raise BuildError(Finding(what, "An expert has one file."))
    if all(name.isdigit() for name in given):
        for name in given:
            if int(name) >= count:
                what = f"there is no expert {name}: the mixture has {count}, counted from 0"
                raise BuildError(Finding(what))
        places, labels = [int(name) for name in given], numbers
    elif len(given) != count:
        what = f"{len(given)} experts are named, the mixture has {count}"
        fix = "Name all of them in order, or give numbers: 0=FILE, 3=FILE."
        raise BuildError(Finding(what, fix))
    else:
        places, labels = list(range(count)), given
    whose: dict[Path, list[int]] = {}
    for place, (_, file) in zip(places, named, strict=True):
        whose.setdefault(file, []).append(place)
    return labels, whose, "given"


def _folder(source: Source) -> Path:
    if source.folder is None:
        raise BuildError(Finding(f"{source.key} has no folder"))
    return source.folder


def _without_weights(folder: Path, source: Source, *, code: bool) -> nn.Module:
    """Return the model without memory for its weights.

    Raises:
        BuildError: transformers does not know it, or needs code that it may not run.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with quiet(), init_empty_weights():
            config = AutoConfig.from_pretrained(str(folder), trust_remote_code=code)
            model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=code)
    except Exception as error:  # code that comes with a checkpoint may raise anything
        if "auto_map" in source.config and not code:
            files = ", ".join(sorted(f.name for f in folder.glob("*.py"))) or "its .py files"
            what = f"{source.key} brings code of its own, which would run with your rights"
            fix = f"Read {files}; then allow it with --trust-remote-code."
            raise BuildError(Finding(what, fix)) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BuildError(Finding(f"transformers cannot make {source.key}: {reason}")) from error
    return model


def _load(source: Source, stack: ExitStack, *, code: bool, device: str, dtype: str) -> nn.Module:
    """Return the model with its weights, from disk as they are needed where they do not fit."""
    from transformers import AutoModelForCausalLM

    specs = source.specs()
    source.locate(next(iter(specs)))  # on the Hub: fetch the weights
    if dtype == "auto":
        needed = sum(spec.nbytes for spec in specs.values())
    else:
        needed = sum(spec.numel for spec in specs.values()) * (4 if dtype == "float32" else 2)
    options: dict[str, Any] = {}
    free = _free_memory()
    if device == "cpu" and needed > _FILLS * free:
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="moeforge-"))
        room = {"cpu": int(_FILLS * free)}
        options = {"device_map": "auto", "max_memory": room, "offload_folder": place}
    with quiet():
        model, info = AutoModelForCausalLM.from_pretrained(
            str(_folder(source)),
            dtype=dtype,
            trust_remote_code=code,
            output_loading_info=True,
            **options,
        )
    wrong = info["missing_keys"] or info["mismatched_keys"]
    if wrong:
        what = f"{source.key} lacks weights that transformers asks for, {sorted(wrong)[0]} first"
        raise BuildError(Finding(what, "It would run with random numbers in their place."))
    loaded: nn.Module = model if options or device == "cpu" else model.to(device)
    return loaded.eval()


def _free_memory() -> int:
    import psutil  # type: ignore[import-untyped]  # accelerate brings it

    return int(psutil.virtual_memory().available)

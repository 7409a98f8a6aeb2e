"""Owns routing reports of checkpoints: opening one, which file is whose, and whether it fits.

Knows folders, the Hub and free memory; leaves the counting to `proof.route`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moeforge.errors import BuildError, Finding, SourceError
from moeforge.forward import quiet
from moeforge.gates._tokenize import load_tokenizer
from moeforge.proof.loading import (
    DTYPES,
    brings_code,
    is_ours,
    loaded,
    reason,
    refuse_other,
    size_of,
)
from moeforge.proof.route import Domain, Progress, experts_of, measure
from moeforge.proof.route_report import Mapping, RouteReport
from moeforge.recipe import prompts
from moeforge.shown import show_size
from moeforge.sources import Source, open_source
from moeforge.system import free_memory

if TYPE_CHECKING:
    from torch import nn

SHORT_PART = 0.25
"""A build looks at its routing only where the result in float32 takes less than this part of the
memory that is free: a second look at the build's end must not push anything else out."""
SHORT_TOKENS = 1000
"""Tokens of each domain that a build looks at."""


def route(
    model: str,
    files: Sequence[Path],
    experts: Sequence[str] = (),
    *,
    revision: str | None = None,
    offline: bool = False,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = lambda done, total: None,
) -> RouteReport:
    """Say where a mixture sends the tokens of prompts.

    The files are the domains. Which expert is right for a domain is said by `experts`; else, where
    there are as many files as experts, file i is expert i's; else the best one-to-one assignment of
    each layer is taken, and the report says so.

    A mixture that does not fit into free memory is run with its layers read from disk.

    Args:
        model: folder or Hub id of a mixture in transformers' form.
        files: prompts, `.txt` or `.jsonl` as in recipes.
        experts: `NAME=FILE` for each expert in order; or `NUMBER=FILE` for some of them.
        revision: branch, tag or commit on the Hub.
        offline: use only what is in the local Hub cache.
        device: torch device.
        dtype: one of `loading.DTYPES`.
        trust_remote_code: run code that comes with the model and is not moeforge's own.
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
    refuse_other(source, trust_remote_code=trust_remote_code)
    if source.folder is None:
        raise SourceError(Finding(f"{model} has no tokenizer", "Add its tokenizer files."))
    tokenizer = load_tokenizer(source.folder)
    code = brings_code(source) and (trust_remote_code or is_ours(source))
    count = experts_of(_without_weights(source, code=code))
    labels, whose, mapping = _mapping(named, list(domains), count)
    read = [
        Domain(domain.name, domain.prompts, tuple(whose.get(file, ())))
        for file, domain in domains.items()
    ]
    with loaded(source, dtype, device, None, trust_remote_code) as run:
        return measure(
            run.model,
            tokenizer,
            read,
            mapping,
            labels,
            name=model,
            device=run.device,
            progress=progress,
        )


def short(
    folder: Path,
    domains: Sequence[Domain],
    labels: Sequence[str],
    *,
    name: str,
    model: nn.Module | None = None,
    progress: Progress = lambda done, total: None,
) -> RouteReport | Finding:
    """Return the routing of a mixture that has just been built, or why it was not looked at.

    At most 1000 tokens of each domain are read, and a prompt's rest.

    Args:
        folder: the result, with its tokenizer.
        domains: texts and, where they are known, their own experts.
        labels: of the experts.
        name: of the model.
        model: the result, where it is in memory already.
        progress: told the prompts done and all of them.

    Raises:
        BuildError: transformers cannot load the result.
    """
    tokenizer = load_tokenizer(folder)
    mapping: Mapping = "given" if any(domain.experts for domain in domains) else "best"

    def look(at: nn.Module) -> RouteReport:
        return measure(
            at,
            tokenizer,
            domains,
            mapping,
            labels,
            name=name,
            most=SHORT_TOKENS,
            progress=progress,
        )

    if model is not None:
        return look(model)
    source = open_source(str(folder.absolute()))
    needed, free = size_of(source, "float32"), free_memory()
    if needed > SHORT_PART * free:
        what = "where tokens go was not measured: in float32 the result takes "
        what += f"{show_size(needed)}, more than a quarter of {show_size(free)} free memory"
        return Finding(what, f"Run it: moeforge route {name} --prompts FILE…")
    with loaded(source, "auto", "cpu", None, False) as run:
        return look(run.model)


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


def _without_weights(source: Source, *, code: bool) -> nn.Module:
    """Return the model without memory for its weights.

    Raises:
        BuildError: transformers cannot make it.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with quiet(), init_empty_weights():
            config = AutoConfig.from_pretrained(str(source.folder), trust_remote_code=code)
            model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=code)
    except Exception as error:  # code that comes with a checkpoint may raise anything
        what = f"transformers cannot make {source.key}: {reason(error)}"
        raise BuildError(Finding(what)) from error
    return model

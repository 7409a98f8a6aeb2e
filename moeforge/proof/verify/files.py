"""Owns what a checkpoint's files say of themselves and of each other; imports no transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moeforge.errors import Finding, MoeforgeError
from moeforge.output.locked import Locked, differences
from moeforge.proof.verify.checks import OK, Check, judged, skipped
from moeforge.sources.folder import INDEX, SINGLE, FolderSource, read_json
from moeforge.sources.header import read_header
from moeforge.vocabulary import chat

_IDS = tuple(
    f"{role}_token_id"
    for role in ("bos", "eos", "pad", "decoder_start", "forced_bos", "forced_eos")
)
"""Ids that generation uses; those of images and of encoders are often defaults nobody reads."""
_AGAIN = "Build or download the checkpoint again."


def check_files(source: FolderSource) -> Check:
    """Look at headers and index: each file whole, each tensor in one file, and listed there.

    Args:
        source: the checkpoint; opening it has found config.json and weights.
    """
    folder = source.folder
    try:
        specs = source.specs()
    except MoeforgeError as error:
        return judged("files", error.findings)
    findings = list(_strays(folder))
    if (folder / INDEX).exists() and not (folder / SINGLE).exists():
        findings += _index_problems(folder)
    total = sum(spec.nbytes for spec in specs.values())
    return judged("files", findings, f"{len(specs)} tensors, {total} bytes")


def _strays(folder: Path) -> Iterator[Finding]:
    """Yield weights files that nothing names: what loads the folder may take the wrong ones."""
    shards = {path.name for path in folder.glob("model-*-of-*.safetensors")}
    listed: set[str] = set()
    if (folder / INDEX).exists():
        if (folder / SINGLE).exists():
            what = f"there are both {SINGLE} and {INDEX}; transformers reads the first only"
            yield Finding(what, "Remove the one that is old.")
            return
        listed = set((read_json(folder / INDEX).get("weight_map") or {}).values())
    for name in sorted(shards - listed):
        yield Finding(f"{name} is named by no index", "Remove it, or write the index anew.")


def _index_problems(folder: Path) -> Iterator[Finding]:
    """Yield what the index and the headers do not agree about."""
    index = read_json(folder / INDEX)
    weight_map: dict[str, str] = index["weight_map"]
    total = 0
    for file in sorted(set(weight_map.values())):
        for name, (spec, _) in read_header(folder / file).items():
            total += spec.nbytes
            said = weight_map.get(name)
            if said is None:
                yield Finding(
                    f"{file} has the tensor {name}, which the index does not list", _AGAIN
                )
            elif said != file:
                what = f"the tensor {name} is in {file}, and the index says {said}"
                yield Finding(what, _AGAIN)
    metadata = index.get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    if size is not None and size != total:
        what = f"the index says {size} bytes of tensors, the files have {total}"
        yield Finding(what, "Correct total_size in the index, or write it anew.")


def check_special_ids(source: FolderSource) -> Check:
    """Look whether the ids of special tokens in config.json and generation_config.json exist.

    An id below zero stands for none: old llamas have pad_token_id -1.
    """
    config = source.config
    inner = config.get("text_config")
    inner = inner if isinstance(inner, dict) else {}
    size = config.get("vocab_size", inner.get("vocab_size"))
    if not isinstance(size, int):
        return skipped("config.json has no vocab_size", "special ids")[0]
    places: list[tuple[str, Mapping[str, Any]]] = [("config.json", config)]
    places.append(("text_config of config.json", inner))
    generation = source.folder / "generation_config.json"
    findings: list[Finding] = []
    if generation.exists():
        try:
            places.append((generation.name, read_json(generation)))
        except MoeforgeError as error:
            findings += error.findings
    found = 0
    for place, data in places:
        for key, value in data.items():
            if key not in _IDS:
                continue
            for index in value if isinstance(value, list) else [value]:
                found += isinstance(index, int)
                if isinstance(index, int) and index >= size:
                    what = f"{key} in {place} is {index}, and there are only {size} tokens"
                    fix = "Correct it; generation and padding use this id."
                    findings.append(Finding(what, fix))
    return judged("special ids", findings, f"{found} ids below {size}")


def check_template(folder: Path) -> Check:
    """Look whether the chat template can be parsed; it is never rendered."""
    try:
        template = chat.read_template(folder)
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        what = f"the chat template cannot be read: {error}"
        return judged("chat template", [Finding(what, "Correct tokenizer_config.json.")])
    if template is None:
        return Check("chat template", OK, "there is none")
    if wrong := chat.problem(template):
        what = f"the chat template is not Jinja: {wrong}"
        return judged("chat template", [Finding(what, "Correct it; chats fail with this one.")])
    return Check("chat template", OK, "parses")


def check_lock(folder: Path, locked: Locked, digests: Mapping[str, str]) -> Check:
    """Compare files with the lock.

    Args:
        folder: the checkpoint.
        locked: what the lock lists.
        digests: hashes, of the lock's kind, of those that are there.
    """
    findings = differences(folder, locked, digests)
    return judged("lock", findings, f"{len(locked.files)} files as they were built")

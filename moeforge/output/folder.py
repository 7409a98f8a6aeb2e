"""Owns what lies in an output folder beside weights: the donor's small files, JSON files."""

from __future__ import annotations

import filecmp
import fnmatch
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moeforge.errors import Finding
from moeforge.sources.folder import module_folders, read_json
from moeforge.texts import refuse_links

_COMPANIONS = {
    "every model": (
        *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
        *("vocab.json", "vocab.txt", "*.model", "*.tiktoken"),
        *("chat_template*", "additional_chat_templates", "generation_config.json"),
        *("*preprocessor_config.json", "processor_config.json"),
    ),
    "models with code of their own": ("*.py",),
    "sentence-transformers models": ("*",),
}
"""Files and folders of the donor that belong to the output, byte for byte, by kind of model."""

_NEVER = (
    *("config.json", "README.md", ".*"),  # written anew, or about the repository
    *("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack"),
    *("*.onnx", "*.onnx_data", "*.xml", "*.gguf", "*.ot", "*.tflite", "*.mlmodel"),
    *("trainer_state.json", "train_results.json", "eval_results.json", "all_results.json"),
    *("events.out.tfevents*", "*.log", "adapter_config.json"),  # leftovers of training
)
"""Files that never do."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")


def has_tokenizer(folder: Path | None) -> bool:
    """Say whether `folder` has the files of a tokenizer."""
    return folder is not None and any(
        fnmatch.fnmatch(file.name, pattern)
        for file in folder.iterdir()
        for pattern in TOKENIZER_FILES
    )


def has_chat_template(folder: Path | None) -> bool:
    """Say whether the tokenizer in `folder` has a chat template, in any of its three places."""
    if folder is None:
        return False
    if any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    config = folder / "tokenizer_config.json"
    return config.exists() and "chat_template" in read_json(config)


def _has_code(donor: Path) -> bool:
    """Say whether a config in `donor` names Python files that transformers may be told to run."""
    configs = (donor / name for name in ("config.json", "tokenizer_config.json"))
    return any("auto_map" in read_json(config) for config in configs if config.exists())


def _belongs(item: Path, modules: Sequence[str], *, code: bool) -> bool:
    """Say whether `item` of a donor with module folders `modules` belongs to the output."""
    kinds = ["every model"]
    kinds += ["models with code of their own"] if code else []
    # Of folders only those that are modules: the rest are checkpoints and other formats.
    kinds += ["sentence-transformers models"] if modules and item.is_file() else []
    patterns = [pattern for kind in kinds for pattern in _COMPANIONS[kind]]
    if item.name in modules:
        return True
    fits = any(fnmatch.fnmatch(item.name, pattern) for pattern in patterns)
    return fits and not any(fnmatch.fnmatch(item.name, pattern) for pattern in _NEVER)


def copy_companions(donor: Path | None, folder: Path) -> list[str]:
    """Copy what belongs to the output beside weights and config; return the names.

    Args:
        donor: folder of the model that they come from; None for none.
        folder: the output folder.

    Raises:
        SourceError: one of them is a link to something of another name.
    """
    if donor is None:
        return []
    modules, code, copied = module_folders(donor), _has_code(donor), []
    for item in sorted(donor.iterdir()):
        if not _belongs(item, modules, code=code):
            continue
        refuse_links(item)
        if item.is_dir():
            shutil.copytree(item, folder / item.name)
        else:
            shutil.copyfile(item, folder / item.name)
        copied.append(item.name)
    return copied


def _module_files(folder: Path) -> dict[str, Path]:
    """Return config.json and weights in the module folders of `folder`, by their path in it."""
    return {
        str(file.relative_to(folder)): file
        for name in module_folders(folder)
        for file in (folder / name).rglob("*")
        if file.name == "config.json" or file.suffix in (".safetensors", ".bin", ".pt")
    }


def _differ(mine: Path | None, theirs: Path | None) -> bool:
    """Say whether two files of one module contradict each other; None for one that is absent."""
    if mine is None or theirs is None:
        return (mine or theirs or Path()).suffix != ".json"
    if mine.suffix == ".json":  # versions of the library state more or fewer settings
        one, other = read_json(mine), read_json(theirs)
        return any(one[key] != other[key] for key in one.keys() & other.keys())
    return not filecmp.cmp(mine, theirs, shallow=False)


def differing_modules(donor: Path | None, others: Iterable[Path | None]) -> list[Finding]:
    """Return what stands against taking the modules of a sentence-transformers model from `donor`.

    Pooling and modules with weights of their own (`2_Dense`) lie in folders of their own and are
    copied, not merged: that is right only where all models agree. A model without modules.json is
    an encoder and nothing else, and has no say.

    Args:
        donor: folder that they are taken from; None for none.
        others: folders of the other models.
    """
    if donor is None:
        return []
    found, mine = [], _module_files(donor)
    for other in others:
        theirs = _module_files(other) if other is not None else {}
        if other is None or not theirs:
            continue
        for name in sorted(mine.keys() | theirs.keys()):
            if _differ(mine.get(name), theirs.get(name)):
                what = f"{name} of {other} is not that of {donor}, and it cannot be merged"
                fix = "Use models that share it, or merge the encoders alone: remove modules.json."
                found.append(Finding(what, fix))
    return found


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write `data` as transformers writes its config files: two spaces, sorted keys."""
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")

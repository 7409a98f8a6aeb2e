"""Owns loading any finished language model with transformers: in memory, or streamed from disk.

Knows checkpoints, free memory and whose code may run; knows nothing of texts or losses.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeforge.errors import BuildError, Finding, SourceError
from moeforge.families import _remote
from moeforge.forward import quiet
from moeforge.sources import Source

if TYPE_CHECKING:
    import torch
    from torch import nn

DTYPES = ("auto", "float32")
"""As stored, which is what users run and takes the least memory; or float32, where small
differences between models are not lost in the rounding of bfloat16 arithmetic."""
_SHARE = 0.8
"""Of the free memory, what weights may take; the rest is for activations and logits."""


@dataclass(frozen=True)
class Loaded:
    """A model that can be run.

    Attributes:
        model: it, in evaluation mode.
        device: where its input goes.
        dtype: of its arithmetic.
        streamed: its weights do not all fit, and are read from disk layer by layer in every pass.
        unused: tensors of the checkpoint that transformers has no place for.
    """

    model: nn.Module
    device: torch.device
    dtype: str
    streamed: bool
    unused: tuple[str, ...]


def refuse_other(source: Source, *, trust_remote_code: bool) -> None:
    """Refuse what is not a causal language model that may be run, by its config alone.

    Raises:
        SourceError: with what it is instead, or whose code it would run.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    config, key = source.config, source.key
    kind, (name, *_) = str(config.get("model_type")), (config.get("architectures") or [""])
    if brings_code(source):
        if trust_remote_code or is_ours(source):
            return
        what = f"{key} is a {kind} model, which needs code of its own to run"
        fix = "Read its .py files; if you trust them, give --trust-remote-code."
        raise SourceError(Finding(what, fix))
    if kind not in KNOWN:
        what = f"{key} is a {kind} model, of which transformers has no causal language model"
        raise SourceError(Finding(what, "Give models that predict the next token."))
    if name and name not in KNOWN.values() and not name.endswith(("ForCausalLM", "LMHeadModel")):
        what = f"{key} is a {name}, not a causal language model"
        raise SourceError(Finding(what, "Give models that predict the next token."))


def brings_code(source: Source) -> bool:
    """Say whether transformers can only run the model with code that lies beside it."""
    from transformers import CONFIG_MAPPING

    native = source.config.get("model_type") in CONFIG_MAPPING
    return "AutoModelForCausalLM" in (source.config.get("auto_map") or {}) and not native


def is_ours(source: Source) -> bool:
    """Say whether the code of a model is, to the letter, what moeforge writes for its type."""
    kind = str(source.config.get("model_type")).removeprefix("moeforge_")
    file = source.folder / _remote.FILE if source.folder else None
    if kind not in _remote.REMOTE or file is None or not file.is_file():
        return False
    text, _, model = _remote.code({**source.config, "model_type": kind})
    named = source.config.get("auto_map") == _remote.auto_map(model)
    return named and file.read_bytes() == text.encode()


def size_of(source: Source, dtype: str) -> int:
    """Return the bytes that the weights take in memory, from headers.

    Args:
        source: the checkpoint.
        dtype: one of DTYPES.
    """
    specs = source.specs().values()
    if dtype == "float32":
        return sum(4 * spec.numel for spec in specs)
    return sum(spec.nbytes for spec in specs)


def _room(device: torch.device, memory: int | None) -> dict[int | str, int]:
    """Return the bytes that weights may take on `device`, and in memory where that is another."""
    from accelerate.utils import get_max_memory

    free = get_max_memory()
    place = device.type if device.type in ("cpu", "mps") else device.index or 0
    kept = {key: int(free[key] * _SHARE) for key in (place, "cpu") if key in free}
    return kept if memory is None else {key: min(room, memory) for key, room in kept.items()}


@contextmanager
def loaded(
    source: Source, dtype: str, device: str, memory: int | None, trust_remote_code: bool
) -> Iterator[Loaded]:
    """Load a model as users would; where its weights do not fit, layers are read as they are run.

    What is streamed is accelerate's work: safetensors are read where they lie, and what
    transformers rearranges on loading, such as experts, is written to a temporary folder first
    (TMPDIR says where). Numbers are the same but for rounding: losses of float32 models agreed
    to 8 digits or more.

    Args:
        source: the checkpoint; `refuse_other` has let it pass.
        dtype: one of DTYPES.
        device: torch device.
        memory: most bytes that its weights may take on the device; four fifths of what is free
            if None.
        trust_remote_code: run code that comes with the model and is not moeforge's own.

    Raises:
        HubError: the weights cannot be downloaded.
        BuildError: transformers cannot load it, or not all of it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    place = torch.device(device)
    room = _room(place, memory)
    first = next(iter(room.values()), None)
    streamed = first is not None and size_of(source, dtype) > first
    source.locate(next(iter(source.specs())))  # downloads what the Hub has
    options: dict[str, Any] = {"device_map": {"": place}}
    with ExitStack() as stack:
        if streamed:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="moeforge-"))
            options = {"device_map": "auto", "max_memory": room, "offload_folder": folder}
        try:
            with quiet(), _silent(logging.getLogger("accelerate.big_modeling")):
                model, info = AutoModelForCausalLM.from_pretrained(
                    str(source.folder),
                    dtype="auto" if dtype == "auto" else torch.float32,
                    trust_remote_code=brings_code(source)
                    and (trust_remote_code or is_ours(source)),
                    output_loading_info=True,
                    **options,
                )
        except Exception as error:  # transformers raises many kinds
            what = f"transformers cannot load {source.key}: {reason(error)}"
            fix = f"{Path(folder).parent} may be full; TMPDIR names another." if streamed else ""
            raise BuildError(Finding(what, fix)) from error
        _refuse_gaps(source.key, info)
        yield Loaded(
            model.eval(),
            place,
            str(model.dtype).removeprefix("torch."),
            streamed,
            tuple(sorted(info["unexpected_keys"])),
        )


@contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    """Silence a logger that would say at length what is done here on purpose."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _refuse_gaps(key: str, info: dict[str, Any]) -> None:
    """Refuse a model of which weights were left random.

    Raises:
        BuildError: tensors are missing, or have another shape than the config says.
    """
    for kind, words in (("missing_keys", "lacks"), ("mismatched_keys", "has other shapes of")):
        if names := sorted(map(str, info.get(kind) or ())):
            what = f"{key} {words} {len(names)} tensors that its config asks for, first {names[0]}"
            raise BuildError(Finding(what, "Download the model again, or correct its config."))


def reason(error: Exception) -> str:
    """Return the first line of what another library said."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

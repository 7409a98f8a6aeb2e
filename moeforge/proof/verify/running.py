"""Owns what only transformers can say of a checkpoint: what it reads, lacks, and computes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeforge.configs import plain_floats
from moeforge.errors import Finding, MoeforgeError
from moeforge.forward import quiet
from moeforge.proof.loading import brings_code, is_ours, loaded, reason, size_of
from moeforge.proof.verify.checks import OK, Check, judged, skipped
from moeforge.shown import show_size
from moeforge.sources.folder import FolderSource
from moeforge.vocabulary import present

if TYPE_CHECKING:
    from torch import nn

NAMES = ("config", "load", "tokenizer", "forward")
_TEXT = "The quick brown fox jumps over the lazy dog."
_TOKENS = 8
_PART = 4
"""Of the free memory, the part that a model may take to be run without being asked for it."""
_PLAIN = (bool, int, float, str, list, tuple, dict)
_UNCOMPARED = {
    *("transformers_version", "_name_or_path", "auto_map", "architectures"),
    *("dtype", "torch_dtype", "rope_theta", "rope_scaling", "rope_parameters"),
    *("use_cache", "model_type"),
}
"""Keys of config.json with more than one spelling, or about no number of the model."""
_RENAMED = {"mamba": "linear_attention", "attention": "full_attention"}
"""Kinds of layers by the names that older configs have for them, which transformers replaces."""


def run_checks(
    folder: Path, *, forward: bool | None, trust_remote_code: bool, inherited: bool
) -> list[Check]:
    """Read, load and run the checkpoint in `folder` with transformers.

    Args:
        folder: a checkpoint whose files are whole.
        forward: run it even if it has to be streamed from disk, or do not run it; None runs it
            where its files can be mapped, or memory allows.
        trust_remote_code: run code that it brings and that is not moeforge's own.
        inherited: its tensors have the names of those of the model it was made from: what is
            missing or unexpected is so there, too, and is told, not refused.
    """
    import transformers
    from transformers import CONFIG_MAPPING, AutoConfig

    source = FolderSource(str(folder), folder)
    kind = source.config.get("model_type")
    code = brings_code(source)
    if "auto_map" in source.config and kind not in CONFIG_MAPPING:
        if not (trust_remote_code or (code and is_ours(source))):
            return skipped("it needs code of its own to run; --trust-remote-code runs it", *NAMES)
        code = True
    elif kind not in CONFIG_MAPPING:
        known = f"transformers {transformers.__version__} does not know {kind} models"
        return skipped(known, *NAMES)
    if "quantization_config" in source.config:
        return skipped("quantised weights need their own engine", *NAMES)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(str(folder), trust_remote_code=code)
    except Exception as error:  # transformers raises many kinds
        what = f"transformers cannot read config.json: {reason(error)}"
        failed = judged("config", [Finding(what, "Correct config.json.")])
        return [failed, *skipped("config.json cannot be read", *NAMES[1:])]
    first = judged("config", _config_findings(source.config, config), "reads as it is written")
    return [first, *_load_and_run(source, config, forward, code=code, inherited=inherited)]


def _config_findings(raw: Mapping[str, Any], config: Any) -> Iterator[Finding]:
    """Yield what transformers reads otherwise than it is written, or than it writes it."""
    for key, wanted, found in _differences(plain_floats(dict(raw)), config, ""):
        what = f"config.json says {key}: {wanted}, and transformers reads {found}"
        yield Finding(what, "Correct it: other engines may read the one or the other.")
    again = type(config).from_dict(config.to_dict())
    before, after = _plain(config.to_dict()), _plain(again.to_dict())
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            what = f"{key} of the config is {before.get(key)}, and {after.get(key)} when read again"
            yield Finding(what, "Correct it in config.json.")


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _differences(raw: Mapping[str, Any], config: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield keys, what they are in the file, and what transformers has read."""
    from transformers import PretrainedConfig

    for key, value in raw.items():
        if value is None or key in _UNCOMPARED:
            continue
        try:
            found = getattr(config, key)
        except (AttributeError, RuntimeError):
            continue  # transformers does not read it, or reads it layer by layer
        if isinstance(found, PretrainedConfig) and isinstance(value, dict):
            yield from _differences(value, found, f"{where}{key}.")
        elif isinstance(found, _PLAIN) and not _says(found, value):
            yield f"{where}{key}", value, found
    theta, rope = raw.get("rope_theta"), getattr(config, "rope_parameters", None)
    read = rope.get("rope_theta") if isinstance(rope, dict) else None
    if isinstance(theta, (int, float)) and isinstance(read, (int, float)) and theta != read:
        yield f"{where}rope_theta", theta, read


def _says(found: Any, value: Any) -> bool:
    """Say whether what was read holds what was written; mappings may have more in them."""
    found, value = _plain(found), _plain(value)
    if isinstance(found, dict) and isinstance(value, dict):
        return all(_says(found.get(key), each) for key, each in value.items() if each is not None)
    if isinstance(found, list) and isinstance(value, list):
        value = [_RENAMED.get(each, each) if isinstance(each, str) else each for each in value]
        found = [_RENAMED.get(each, each) if isinstance(each, str) else each for each in found]
    return bool(found == value)


def _class_of(source: FolderSource, *, code: bool) -> Any:
    """Return the class that loads the checkpoint."""
    import transformers

    named = next(iter(source.config.get("architectures") or ()), None)
    if code:
        mapped = source.config["auto_map"]
        autos = ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModel")
        return getattr(transformers, next(name for name in autos if name in mapped))
    if named and (found := getattr(transformers, named, None)):
        return found
    kind = source.config.get("model_type")
    causal = kind in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModel


def _load_and_run(
    source: FolderSource, config: Any, forward: bool | None, *, code: bool, inherited: bool
) -> list[Check]:
    from accelerate.utils import get_max_memory

    size, free = size_of(source, "auto"), get_max_memory()["cpu"]
    whole = forward is not False and size <= free // _PART
    rest = NAMES[2:]
    try:
        model, info = _load(source, code=code, meta=not whole)
        load = _gaps(info, inherited=inherited)
        if load.state != OK:
            return [load, *skipped("it does not load as it is", *rest)]
        tokens, ids = _tokenizer(source.folder, model)
        if forward is False:
            return [load, tokens, *skipped("it was not asked for", "forward")]
        if not whole and _lies_as_it_is(source, model):
            model, whole = _load(source, code=code, meta=False)[0], True
    except Exception as error:  # transformers raises many kinds
        what = f"transformers cannot load it: {reason(error)}"
        return [
            judged("load", [Finding(what, "Correct the config or the weights.")]),
            *skipped("it cannot be loaded", *rest),
        ]
    if whole:
        return [load, tokens, _forward(model.eval(), config, ids)]
    if forward is None:
        why = f"its {show_size(size)} are more than a quarter of the free memory"
        how = f"`moeforge verify {source.folder} --forward` streams it from disk"
        return [load, tokens, *skipped(f"{why}; {how}", "forward")]
    try:
        with loaded(source, "auto", "cpu", None, code) as streamed:
            return [load, tokens, _forward(streamed.model, config, ids)]
    except MoeforgeError as error:
        return [load, tokens, judged("forward", error.findings)]


def _load(source: FolderSource, *, code: bool, meta: bool) -> tuple[Any, dict[str, Any]]:
    """Load the model, or only its names and shapes; also return what transformers says of it."""
    with quiet():
        model, info = _class_of(source, code=code).from_pretrained(
            str(source.folder),
            dtype="auto",
            trust_remote_code=code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported instead of raised
            local_files_only=True,
            **({"device_map": "meta"} if meta else {}),
        )
    return model, info


def _lies_as_it_is(source: FolderSource, model: nn.Module) -> bool:
    """Say whether every parameter is a tensor of the files, in the same dtype.

    Then transformers maps the files: running the model takes memory that the system can have back
    at any moment, however large it is. What is rearranged on loading, as experts are, is copied.
    """
    specs = source.specs()
    return all(
        name in specs and specs[name].dtype.name == str(parameter.dtype).removeprefix("torch.")
        for name, parameter in model.named_parameters()
    )


def _gaps(info: Mapping[str, Any], *, inherited: bool) -> Check:
    """Judge what transformers missed and what it had no place for."""
    findings = []
    for kind, words in (
        ("missing_keys", "transformers misses {} tensors, first {}: they would be random"),
        ("unexpected_keys", "transformers has no place for {} tensors, first {}"),
    ):
        if names := sorted(map(str, info.get(kind) or ())):
            fix = "" if inherited else "Correct config.json, or build the checkpoint again."
            findings.append(Finding(words.format(len(names), names[0]), fix, warning=inherited))
    if inherited and findings:
        told = [Finding(f"{f.what}; so it is in its inputs", warning=True) for f in findings]
        load = Check("load", OK, "every key as in its inputs", tuple(told))
    else:
        load = judged("load", findings, "no key is missing, unexpected or of another shape")
    if wrong := sorted(info.get("mismatched_keys") or (), key=str):
        name, here, asked = wrong[0]
        what = f"{len(wrong)} tensors have other shapes than config.json asks for, first {name}: "
        what += f"{list(here)} instead of {list(asked)}"
        return judged("load", [Finding(what, "Correct config.json.")])
    if errors := info.get("error_msgs"):
        return judged("load", [Finding(str(errors[0]), "Build or download it again.")])
    return load


def _tokenizer(folder: Path, model: Any) -> tuple[Check, list[int] | None]:
    """Compare the tokenizer with the embeddings; also return ids of a short text."""
    from transformers import AutoTokenizer

    if not present(folder):
        return skipped("there is none", "tokenizer")[0], None
    try:
        rows = int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError, TypeError):
        return skipped("the model has no embeddings of tokens", "tokenizer")[0], None
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
            highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
            ids = list(tokenizer(_TEXT)["input_ids"])[:_TOKENS]
    except Exception as error:  # transformers raises many kinds
        what = f"transformers cannot load the tokenizer: {reason(error)}"
        return judged("tokenizer", [Finding(what, "Copy it again from its model.")]), None
    if highest[1] >= rows:
        what = f"the token {highest[0]!r} has id {highest[1]}, and the embeddings have {rows} rows"
        fix = "Take the tokenizer of the model, or resize its embeddings."
        return judged("tokenizer", [Finding(what, fix)]), None
    return Check("tokenizer", OK, f"ids to {highest[1]}, {rows} rows of embeddings"), ids


def _forward(model: nn.Module, config: Any, ids: list[int] | None) -> Check:
    """Run a short text, or some ids where there is no tokenizer, and look at what comes out."""
    import torch

    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return skipped(f"the model takes {model.main_input_name}, not text", "forward")[0]
    size = getattr(config.get_text_config(), "vocab_size", None) or _TOKENS
    ids = ids or [(7 * number + 3) % size for number in range(_TOKENS)]
    given = {"input_ids": torch.tensor([ids])}
    if getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = given["input_ids"]
    try:
        with torch.no_grad(), quiet():
            made = model(**given)
    except Exception as error:  # whatever a model may raise
        what = f"running it failed: {reason(error)}"
        return judged("forward", [Finding(what, "Correct config.json.")])
    found = made.get("logits")
    if found is None:
        found = next(
            v for v in made.values() if isinstance(v, torch.Tensor) and v.is_floating_point()
        )
    odd = int((~torch.isfinite(found.float())).sum())
    if odd:
        what = f"{odd} of {found.numel()} outputs for a text of {len(ids)} tokens are not finite"
        fix = "Weights may be too large for their dtype: build it with dtype: bfloat16 or float32."
        return judged("forward", [Finding(what, fix)])
    return Check("forward", OK, f"{found.numel()} outputs of {len(ids)} tokens, all finite")

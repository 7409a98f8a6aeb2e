"""Owns what planners mean by a model: a checkpoint or inline recipe, as named expressions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from moeforge.configs import Config, n_layers, rope
from moeforge.errors import Finding
from moeforge.plans import Dequantize, PlannedTensor, Read, walk
from moeforge.sources import Source, quantized
from moeforge.tensors import TensorSpec
from moeforge.vocabulary import read
from moeforge.vocabulary.change import TokenizerChange

HEAD = "lm_head.weight"
EMBEDDINGS = "model.embed_tokens.weight"
TIED = "tied: the model uses its embeddings as head"
_RECOMPUTED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_TABLE = ".relative_attention_bias.weight"
NUMBERED = re.compile(r"^(?P<stem>(?:[^.]+\.)*?)(?P<index>\d+)\.(?P<rest>.+)$")
"""The name of a tensor of a layer: what stands before the layer's number, the number, the rest."""


@dataclass(frozen=True)
class Layers:
    """Where the layers of a model lie: tensors named `{stem}{index}.{rest}`.

    Attributes:
        stem: what stands before the layer number, `model.layers.`; "" where there are no layers.
        count: number of layers.
        tables: tensors that lie in the first layer and serve all: T5's relative positions.
    """

    stem: str
    count: int
    tables: frozenset[str] = frozenset()

    def split(self, name: str) -> tuple[int, str] | None:
        """Return layer and rest of `name`, or None where it belongs to no layer."""
        if not self.stem or not name.startswith(self.stem) or name in self.tables:
            return None
        index, _, rest = name[len(self.stem) :].partition(".")
        return (int(index), rest) if index.isdigit() and rest else None


@dataclass(frozen=True)
class Model:
    """A dense model that takes part in a recipe.

    Attributes:
        label: how messages call it.
        config: raw config.json, or what an inline recipe would write.
        tensors: its tensors by name; an inline recipe's are expressions.
        donor: the source whose tokenizer it has.
        sources: every source that its expressions read.
        left_out: tensors of its checkpoints that knowingly have no place, with the reason.
        notes: what is worth knowing about how it is read.
        tokenizer: how its tokenizer differs from the donor's; None if it does not.
    """

    label: str
    config: Config
    tensors: Mapping[str, PlannedTensor]
    donor: Source
    sources: Mapping[str, Source]
    left_out: Mapping[Read, str] = field(default_factory=dict)
    notes: tuple[Finding, ...] = ()
    tokenizer: TokenizerChange | None = None

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """Id of every token of its tokenizer.

        It is kept: ask it of a model that others are compared with, and `vocab.tokens_of` of those.

        Raises:
            SourceError: it has no tokenizer that can be used.
        """
        if self.tokenizer is not None and self.tokenizer.tokens is not None:
            return self.tokenizer.tokens.ids
        return read(self.donor.folder, self.label).ids

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding matrix."""
        return HEAD not in self.tensors and EMBEDDINGS in self.tensors

    @cached_property
    def layers(self) -> Layers:
        """The layers: the only numbered tensors that are as many as the config says."""
        expected = n_layers(self.config)
        found = [stem for stem, count in towers(self.tensors).items() if count == expected]
        if len(found) != 1 or not expected:
            return Layers("", 0)
        (stem,) = found
        first = (name for name in self.tensors if name.startswith(f"{stem}0."))
        tables = {name for name in first if name.endswith(_TABLE)}
        if any(name.replace(f"{stem}0.", f"{stem}1.") in self.tensors for name in tables):
            tables = set()  # every layer has its own
        return Layers(stem, expected, frozenset(tables))

    def leads(self, name: str) -> bool:
        """Say whether `name`, which belongs to no layer, comes before the layers."""
        return is_input(name) or name in self.layers.tables

    @cached_property
    def _towers(self) -> dict[str, int]:
        return towers(self.tensors)

    def position(self, name: str) -> float:
        """Return where tensor `name` lies for gradients, from 0 at its tower's first layer to 1.

        Outside the layers it is 0; in a tower of one layer 1, as in mergekit. A model of several
        modules has several towers.
        """
        match = NUMBERED.match(name)
        count = self._towers.get(match["stem"]) if match else None
        if match is None or count is None:
            return 0.0
        return int(match["index"]) / (count - 1) if count > 1 else 1.0


def towers(names: Iterable[str]) -> dict[str, int]:
    """Return the number of layers below each stem that has them: numbered from zero, no gaps."""
    found: dict[str, set[int]] = {}
    for name in names:
        if match := NUMBERED.match(name):
            found.setdefault(match["stem"], set()).add(int(match["index"]))
    return {stem: len(i) for stem, i in found.items() if i == set(range(len(i)))}


def from_source(source: Source) -> Model:
    """Return the model that checkpoint `source` is.

    Rotary tables of old exports and the copy that a tied model carries of its embeddings are left
    out: transformers ignores them too. Float8 codes become the numbers that they stand for, in
    the dtype that the config says the model computes in.

    Raises:
        SourceError: it is quantised in a way that cannot be undone.
    """
    tensors: dict[str, PlannedTensor] = {}
    left_out: dict[Read, str] = {}
    specs, config = source.specs(), source.config
    quantized.refuse_packed(source.key, specs)
    scales = quantized.find_scales(source.key, specs, config)
    plain, used = quantized.plain_dtype(config), set(scales.values())
    tied = config.get("tie_word_embeddings") is True and EMBEDDINGS in specs
    for name in sorted(specs, key=natural):
        here = Read(source.key, name)
        if _RECOMPUTED.search(name):
            left_out[here] = "recomputed by the model when it loads"
        elif name == HEAD and tied:
            left_out[here] = TIED
        elif scales and quantized.is_activation_scale(name):
            left_out[here] = quantized.ACTIVATION_SCALE
        elif name in scales:
            scale = Read(source.key, scales[name])
            spec = TensorSpec(plain, specs[name].shape)
            tensors[name] = PlannedTensor(name, spec, Dequantize(here, scale))
        elif name not in used:
            tensors[name] = PlannedTensor(name, specs[name], here)
    notes: tuple[Finding, ...] = ()
    if any(config.get(key) for key in quantized.KEYS) or scales:
        config = {key: value for key, value in config.items() if key not in quantized.KEYS}
        what = f"{source.key}: {len(scales)} float8 tensors are multiplied by their scales"
        notes = (Finding(f"{what} and read as {plain}; the output is not quantised"),)
    return Model(source.key, config, tensors, source, {source.key: source}, left_out, notes)


def natural(name: str) -> tuple[int, list[tuple[int, int | str]]]:
    """Return a key that sorts embeddings first, layers by number, and the head last."""
    first = 0 if is_input(name) else 2 if not NUMBERED.match(name) else 1
    parts: list[tuple[int, int | str]] = [
        (0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")
    ]
    return first, parts


_INPUT = re.compile(
    r"(^|\.)(embed|wte|wpe|word_embeddings|tok_embeddings|emb_|shared\.|layernorm_embedding"
    r"|patch_|pos_embed|class_embedding|positional_embedding|conv\d\.|ln_pre|pre_layrnorm"
    r"|layernorm_pre)"
)


def is_input(name: str) -> bool:
    """Say whether a tensor outside the layers comes before them (embeddings) or after (head).

    Of a vision tower, what makes patches and the norm of their sum come before.
    """
    return not NUMBERED.match(name) and bool(_INPUT.search(name))


def listing(names: Iterable[str], most: int = 3) -> str:
    """Return the first few of `names`, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def main_dtype(tensors: Iterable[PlannedTensor]) -> str | None:
    """Return the name of the dtype that most elements have; None where there are none."""
    counts: dict[str, int] = {}
    for tensor in tensors:
        name = tensor.spec.dtype.name
        counts[name] = counts.get(name, 0) + tensor.spec.numel
    return max(counts, key=counts.__getitem__, default=None)


def reads(tensor: PlannedTensor) -> Iterator[Read]:
    """Yield every tensor that `tensor` is made of."""
    return (part for part in walk(tensor.expr) if isinstance(part, Read))


def unused(
    models: Iterable[Model], tensors: Iterable[PlannedTensor]
) -> Iterator[tuple[Model, Read]]:
    """Yield everything that `models` read and `tensors` do not, with the model."""
    taken = {read for tensor in tensors for read in reads(tensor)}
    for model in models:
        for tensor in model.tensors.values():
            yield from ((model, read) for read in reads(tensor) if read not in taken)


_COUNTED = (
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"),
    "max_position_embeddings",
)
_FACTS = {
    "model_type": "model_type",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "layers",
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key/value heads",
    "head_dim": "head_dim",
    "vocab_size": "vocabulary entries",
    "hidden_act": "activation",
    "rope_theta": "rope_theta",
    "rope_scaling": "rope scaling",
    "max_position_embeddings": "positions",
    "rms_norm_eps": "rms_norm_eps",
}


def fact(config: Config, key: str) -> Any:
    """Return what a config says under `key`, in whichever spelling, or None."""
    if key in ("rope_theta", "rope_scaling"):
        parameters = rope(config)
        if parameters is None:
            return None
        if key == "rope_theta":
            return parameters["rope_theta"]
        scaled = {k: v for k, v in parameters.items() if k != "rope_theta"}
        return json.dumps(scaled, sort_keys=True) if scaled != {"rope_type": "default"} else "none"
    if key == "num_hidden_layers":
        return n_layers(config)
    return config.get(key)


def differences(one: Model, other: Model, keys: Iterable[str] = _FACTS) -> dict[str, str]:
    """Return a sentence for each fact of the configs that both state and that differs."""
    result = {}
    for key in keys:
        mine, theirs = fact(one.config, key), fact(other.config, key)
        if mine is not None and theirs is not None and mine != theirs:
            word = _FACTS[key]
            said = f"{theirs} {word}" if key in _COUNTED else f"{word} {theirs}"
            result[key] = f"{other.label} has {said}, {one.label} has {mine}"
    return result


class Findings(list[Finding]):
    """What a planner collects before it refuses everything at once."""

    def error(self, what: str, fix: str = "", path: tuple[str | int, ...] = ()) -> None:
        """Add a finding, once."""
        self._once(Finding(what, fix, path))

    def warn(self, what: str, fix: str = "", path: tuple[str | int, ...] = ()) -> None:
        """Add, once, what is allowed and probably harms the result."""
        self._once(Finding(what, fix, path, warning=True))

    def _once(self, finding: Finding) -> None:
        if finding not in self:
            self.append(finding)

"""Owns applying a LoRA adapter to a model: its tensors become part of the model's expressions.

The result is that of peft's merge_and_unload(), planned from headers. Knows how peft names things,
and no file.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moeforge.errors import Path
from moeforge.planners.adapter_places import (
    find_rename,
    is_head,
    layer_stem,
    stores_transposed,
    text_config,
    tied_embedding,
    token_embedding,
)
from moeforge.planners.adapter_settings import AGAIN, WITH_PEFT, Settings, problems
from moeforge.planners.model import HEAD, Findings, Model, listing, reads
from moeforge.plans import Lora, Merge, PlannedTensor, Read
from moeforge.sources import Source
from moeforge.tensors import TensorSpec

_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_(A\.weight|B\.weight|B\.bias|embedding_[AB]|magnitude_vector))"
)
_COPY = re.compile(r"\.(modules_to_save|original_module)\.")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_FACTORS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
_OTHER = "Use the model that the adapter was trained on."


def apply_adapter(model: Model, adapter: Source, findings: Findings, path: Path) -> Model | None:
    """Return `model` with `adapter` applied, as peft's merge_and_unload() would leave it.

    Every tensor of the adapter is used, or named in a finding. Dtypes stay those of the model.
    None where something was found wrong.

    Args:
        model: what it is applied to; may be an inline recipe.
        adapter: adapter_config.json as its config, adapter_model.safetensors as its tensors.
        findings: gets what stands against it.
        path: where in the recipe.
    """
    work = _Application(model, adapter, findings, path)
    before = len(findings)
    for what, fix in problems(adapter.config):
        work.error(what, fix)
    if adapter.key in model.sources and model.sources[adapter.key].config != adapter.config:
        work.error("a model has the same name", "Give the adapter a folder of its own.")
    if len(findings) == before:
        work.run()
    if len(findings) > before:
        return None
    return replace(
        model,
        label=f"{model.label}+{adapter.key}",
        config=work.config,
        tensors=work.tensors,
        donor=work.donor,
        tokenizer=model.tokenizer if work.donor is model.donor else None,
        sources={**model.sources, adapter.key: adapter},
        left_out={**model.left_out, **work.left_out},
    )


def _equal(source: Source, one: str, other: str) -> bool:
    """Say whether two tensors have the same bytes, dtype and shape."""
    spec = source.specs()[one]
    if source.specs()[other] != spec:
        return False
    for start in range(0, spec.nbytes, 2**20):
        mine, theirs = (bytearray(min(2**20, spec.nbytes - start)) for _ in range(2))
        source.read(one, start, memoryview(mine))
        source.read(other, start, memoryview(theirs))
        if mine != theirs:
            return False
    return True


@dataclass
class _Application:
    """One adapter on its way into one model, collecting what is wrong."""

    model: Model
    adapter: Source
    findings: Findings
    path: Path
    pairs: dict[str, dict[str, str]] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)
    unused: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    left_out: dict[Read, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tensors = dict(self.model.tensors)
        self.config = self.model.config
        self.donor = self.model.donor
        self.settings = Settings(self.adapter.config)
        self.specs = self.adapter.specs()
        self.embedding = token_embedding(self.model)
        self.tied = tied_embedding(self.model)
        self.transposed = stores_transposed(self.model)
        self.drop = self.add = ""

    def error(self, what: str, fix: str) -> None:
        """Add a finding about the adapter."""
        self.findings.error(f"adapter {self.adapter.key}: {what}", fix, self.path)

    def run(self) -> None:
        """Plan all changes."""
        self._sort()
        shapes = {name: self.specs[tensor].shape for name, tensor in self.stored.items()}
        for module, parts in self.pairs.items():
            factors = [self.specs[parts[key]].shape for key in _FACTORS if key in parts]
            shapes[f"{module}.weight"] = tuple(max(shape, default=0) for shape in factors)
        self.drop, self.add = find_rename(shapes, self.model)
        self._untie()
        for name, tensor in self.stored.items():
            self._store(name, tensor)
        for module, parts in self.pairs.items():
            self._adapt(module, parts)
        self._finish_vocabulary()
        for (why, fix), names in self.unused.items():
            self.error(f"{why}: {listing(names)}", fix)

    def _sort(self) -> None:
        """Divide the adapter's tensors into factors of matrices and tensors stored whole."""
        for name, spec in self.specs.items():
            bare = name.removeprefix(_PREFIX)
            part = _PART.fullmatch(bare)
            whole = bare.replace(".base_layer.", ".")
            copied = _COPY.sub(".", name)
            if copied != name and copied in self.specs:
                # Beside a resized vocabulary, peft stores these once more.
                self.left_out[Read(self.adapter.key, name)] = f"stored as {copied} too"
                continue
            if not spec.dtype.mergeable:
                self._unuse(name, f"tensors of dtype {spec.dtype}", WITH_PEFT)
            elif part:
                self.pairs.setdefault(part["module"], {})[part["part"]] = name
            elif "trainable_tokens" in bare:
                self._unuse(name, "trainable tokens are not supported", WITH_PEFT)
            elif "lora_" in bare or whole in self.stored:
                fix = f"If it holds several adapters, save one of them alone. {WITH_PEFT}"
                self._unuse(name, "tensors that plain LoRA does not have", fix)
            else:
                self.stored[whole] = name

    def _unuse(self, name: str, why: str, fix: str) -> None:
        self.unused.setdefault((why, fix), []).append(name)

    def _no_place(self, name: str) -> None:
        if self.settings.parameters:
            self._unuse(name, "target_parameters (fused experts) are not supported", WITH_PEFT)
        else:
            self._unuse(name, f"{self.model.label} has nothing of this name to adapt", _OTHER)

    def _place(self, name: str) -> str | None:
        """Return the model's name for tensor `name` of the adapter's model, if it has it."""
        if name.startswith(self.drop) and self.add + name.removeprefix(self.drop) in self.tensors:
            return self.add + name.removeprefix(self.drop)
        if layer_stem(name) is not None:
            return None
        _, module, kind = f".{name}".rsplit(".", 2)
        outside = [n for n in self.tensors if layer_stem(n) is None and n.endswith(f".{kind}")]
        found = [n for n in outside if n.split(".")[-2] == module]
        if not found and is_head(name):  # transformers calls some heads otherwise than their files
            found = [n for n in outside if is_head(n)]
            return found[0] if found else self.tied if kind == "weight" else None
        return found[0] if len(found) == 1 else None

    def _untie(self) -> None:
        """Give the model a head of its own where peft does: for one of the two in modules_to_save.

        What is stored without being named there (a resized vocabulary) is put into the tied
        matrix, and so are low-rank changes of either.
        """
        if self.tied is None or self.settings.tying:
            return
        saved = tuple(f".{module}.weight" for module in self.settings.saved)
        owns = [n for n in self.stored if self._place(n) == self.tied and f".{n}".endswith(saved)]
        if not owns:
            return
        if self.tied.count(".") > 2:
            what = f"{listing(owns)} unties a head whose name is not known"
            self.error(what, f"The embedding is {self.tied}. {WITH_PEFT}")
            return
        self.tensors[HEAD] = replace(self.tensors[self.tied], name=HEAD)
        self.config = {**self.config, "tie_word_embeddings": False}
        self.tied = None

    def _store(self, name: str, tensor: str) -> None:
        """Put a tensor that is stored whole in the place of the model's."""
        target = self._place(name)
        if target is None:
            self._no_place(tensor)
            return
        shape, planned = self.specs[tensor].shape, self.tensors[target]
        grown = target == self.embedding or (self.embedding and is_head(target))
        if shape != planned.spec.shape and not (grown and shape[1:] == planned.spec.shape[1:]):
            was = f"{target} of {self.model.label} is {list(planned.spec.shape)}"
            self.error(f"{tensor} is {list(shape)}, {was}", _OTHER)
            return
        twin = planned.expr
        if isinstance(twin, Read) and twin.source == self.adapter.key:
            # The tied matrix, saved under both its names. Should it have been two matrices, no
            # header tells; the adapter is on this machine, so that looking is cheap.
            if not _equal(self.adapter, twin.name, tensor):
                what = f"{twin.name} and {tensor} differ, but {self.model.label} ties them"
                self.error(what, _OTHER)
            self.left_out[Read(self.adapter.key, tensor)] = f"stored as {twin.name} too"
            return
        why = f"adapter {self.adapter.key} replaces it"
        self.left_out.update(dict.fromkeys(reads(planned), why))
        spec = TensorSpec(planned.spec.dtype, shape)
        self.tensors[target] = PlannedTensor(target, spec, Read(self.adapter.key, tensor))

    def _adapt(self, module: str, parts: Mapping[str, str]) -> None:
        """Add a low-rank product to the weight of `module`."""
        target = self._place(f"{module}.weight")
        embedded = "lora_embedding_A" in parts
        pair = _FACTORS[2:] if embedded else _FACTORS[:2]
        if target is None or set(pair) != {key for key in parts if key in _FACTORS}:
            for name in parts.values():
                if target is None:
                    self._no_place(name)
                else:
                    self._unuse(name, "no pair of A and B", AGAIN)
            return
        a, b = (self.specs[parts[key]].shape for key in pair)
        weight = self.tensors[target]
        transposed = embedded or (self.transposed and layer_stem(target) is not None)
        rank = self.settings.rank(module)
        shape = weight.spec.shape[::-1] if transposed else weight.spec.shape
        if len(shape) != 2 or a != (rank, shape[1]) or b != (shape[0], rank):
            factors = f"{parts[pair[0]]} is {list(a)} and B {list(b)}, of rank {rank} by its config"
            was = f"{target} of {self.model.label} is {list(weight.spec.shape)}"
            self.error(f"{factors}; {was}", _OTHER)
            return
        if not weight.spec.dtype.mergeable:
            what = f"{target} of {self.model.label} is {weight.spec.dtype}"
            self.error(what, "Apply the adapter to the unquantised model.")
            return
        scale = self.settings.scale(module)
        reads = [Read(self.adapter.key, parts[key]) for key in pair]
        magnitude = self._magnitude(module, parts, shape[0], transposed=transposed)
        expr = Lora(weight.expr, reads[0], reads[1], scale, transposed, magnitude)
        self.tensors[target] = replace(weight, expr=expr)
        self._shift_bias(module, parts, scale)

    def _magnitude(
        self, module: str, parts: Mapping[str, str], outputs: int, *, transposed: bool
    ) -> Read | None:
        """Return DoRA's lengths for `module`, where it has them."""
        name = parts.get("lora_magnitude_vector")
        if (name is not None) != self.settings.dora:
            has = "a" if name else "no"
            what = f"use_dora is {self.settings.dora}, but {module} has {has} lora_magnitude_vector"
            self.error(what, AGAIN)
        elif name and transposed:
            what = f"{name}: DoRA on an embedding, or on a matrix stored as [in, out], needs the "
            self.error(f"{what}lengths of columns, which are not supported", WITH_PEFT)
        elif name and self.specs[name].shape != (outputs,):
            shape = list(self.specs[name].shape)
            self.error(f"{name} is {shape}, {module} has {outputs} outputs", _OTHER)
        return Read(self.adapter.key, name) if name else None

    def _shift_bias(self, module: str, parts: Mapping[str, str], scale: float) -> None:
        """Add B's own bias (`lora_bias`), scaled as B is, to the bias of `module`."""
        name = parts.get("lora_B.bias")
        if name is None:
            return
        target = self._place(f"{module}.bias")
        if target is None or self.tensors[target].spec.shape != self.specs[name].shape:
            self._unuse(name, f"{self.model.label} has no bias of this shape", _OTHER)
            return
        bias = self.tensors[target]
        params = (("weight", (1.0, scale)), ("normalize", False))
        expr = Merge("linear", (bias.expr, Read(self.adapter.key, name)), params)
        self.tensors[target] = replace(bias, expr=expr)

    def _finish_vocabulary(self) -> None:
        """Follow a vocabulary of another size in config and tokenizer."""
        names = [n for n in self.tensors if n == self.embedding or is_head(n)]
        sizes = {n: self.tensors[n].spec.shape[0] for n in names}
        before = self.model.tensors
        if all(n not in before or before[n].spec.shape[0] == sizes[n] for n in names):
            return
        if len(set(sizes.values())) > 1:
            said = ", ".join(f"{name} would have {rows}" for name, rows in sizes.items())
            fix = "Export the adapter with save_embedding_layers=True, which stores all of them."
            self.error(f"the vocabulary would not be one: {said} rows", fix)
            return
        self.config = copy.deepcopy(self.config)
        text_config(self.config)["vocab_size"] = next(iter(sizes.values()))
        folder = self.adapter.folder
        if folder and any((folder / name).exists() for name in _TOKENIZERS):
            self.donor = self.adapter

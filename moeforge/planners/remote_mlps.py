"""Owns the MLPs of a mixture with code of its own: where they lie, their widths, their factors."""

from __future__ import annotations

import re
from collections.abc import Iterator

from moeforge.dense import WIDTHS, anatomy, hidden_size
from moeforge.errors import Path
from moeforge.families import _remote
from moeforge.planners.fit import report_extra
from moeforge.planners.model import Findings, Model, listing, reads
from moeforge.planners.parts import ExpertParts, Parts, Piece, joined, scaled
from moeforge.plans import Columns, Fill, PlannedTensor, Rows, pieces
from moeforge.tensors import DType, TensorSpec

Tensors = dict[str, PlannedTensor]

_OUTPUT = re.compile(
    r"^(down_proj|c_proj|fc2|fc_out|dense_4h_to_h|w2|w_out\.w_0|w_out|Wo|proj_down|output_linear|2)"
    r"\.(weight|bias)$"
)
"""The last linear map of an MLP, as the families call it."""


class Mlps:
    """The MLPs of the models that a mixture is made of, by the names of their modules.

    Attributes:
        base: all tensors of the base by the names of its modules.
        unloaded: what the base's checkpoint has besides.
        resized: keys of the config that say another width than the base's, where one is needed.
    """

    def __init__(self, parts: Parts, findings: Findings, path: Path) -> None:
        self._parts = parts
        self._place = anatomy(parts.base.config)
        self._inline = _remote.REMOTE[str(parts.base.config["model_type"])].inline
        self._hidden = hidden_size(parts.base.config) or 0
        self.base = _remote.named_as_modules(parts.base.config, parts.base.tensors)
        loaded = {read for tensor in self.base.values() for read in reads(tensor)}
        self.unloaded = {read for tensor in parts.base.tensors.values() for read in reads(tensor)}
        self.unloaded -= loaded
        self._found = {parts.base.label: self._mlps(self.base)}
        for expert in (*parts.experts, *parts.shared):
            for model in expert.distinct:
                renamed = _remote.named_as_modules(model.config, model.tensors)
                report_extra(parts.base, self.base, model, renamed, findings, expert.path)
                self._found[model.label] = self._mlps(renamed)
        self.resized: dict[str, int] = {}
        self._width = 0
        if self._names_fit(findings, path):
            self._choose_width(findings, path)

    def _mlps(self, tensors: Tensors) -> dict[int, Tensors]:
        """Return for each layer the tensors of its MLP by their names within it."""
        found: dict[int, Tensors] = {}
        for name, tensor in tensors.items():
            if place := self.split(name):
                found.setdefault(place[0], {})[place[1]] = tensor
        return found

    def split(self, name: str) -> tuple[int, str] | None:
        """Return layer and name within its MLP of a tensor; None if it is of no MLP."""
        number, _, rest = name.removeprefix(self._place.layers).partition(".")
        if not name.startswith(self._place.layers) or not number.isdigit():
            return None
        if self._inline:
            return (int(number), rest) if rest.startswith(("fc1.", "fc2.")) else None
        inside = rest.removeprefix(f"{self._place.mlp}.")
        return (int(number), inside) if inside != rest else None

    def of(self, model: Model, layer: int) -> Tensors:
        """Return the tensors of the MLP of `model` in `layer`, by their names within it."""
        return self._found[model.label][layer]

    def block(self, layer: int) -> str:
        """Return the module that has the router and the experts of a layer."""
        return f"{self._place.layers}{layer}.{self._place.mlp}"

    def _served(self) -> Iterator[tuple[ExpertParts, int]]:
        """Yield every expert and every layer that it has an MLP in."""
        for expert in (*self._parts.experts, *self._parts.shared):
            for layer, sparse in enumerate(self._parts.mixture.sparse):
                if sparse:
                    yield expert, layer

    def _names_fit(self, findings: Findings, path: Path) -> bool:
        """Say whether every MLP is made of the tensors that the base's is; report those not."""
        before, base = len(findings), self._parts.base
        layers = range(len(self._parts.mixture.sparse))
        if absent := [layer for layer in layers if layer not in self._found[base.label]]:
            what = f"{base.label} has no tensors {self.block(absent[0])}.*"
            findings.error(what, "Download or export it again.", (*path, "base_model"))
            return False
        for expert, layer in self._served():
            label, block = expert.models[layer].label, self.block(layer)
            mine = self._found[base.label][layer]
            theirs = self._found[label].get(layer, {})
            if extra := sorted(set(theirs) - set(mine)):
                what = f"{label} has {listing(extra)} in {block}, the base has not"
                findings.error(what, "Use fine-tunes of the base.", expert.path)
            if missing := sorted(set(mine) - set(theirs)):
                what = f"{label} lacks {listing(missing)} in {block}"
                findings.error(what, "Use fine-tunes of the base.", expert.path)
            if expert.entry.residual_scale != 1.0 and not any(map(_OUTPUT.match, theirs)):
                what = f"residual_scale: which of {listing(sorted(theirs))} it scales is not known"
                findings.error(what, "Leave it out.", expert.path)
            if expert.entry.noise_scale:
                what = "noise_scale: a mixture with code of its own has its experts without noise"
                findings.error(what, "Leave it out.", expert.path)
        return len(findings) == before

    def _choose_width(self, findings: Findings, path: Path) -> None:
        """Find the width of all MLPs; report those that differ where zeros may not fill them up."""
        base = self._parts.base
        differing: set[str] = set()
        for expert, layer in self._served():
            mine, label = self._found[base.label][layer], expert.models[layer].label
            for name, tensor in self._found[label][layer].items():
                shape, wanted = list(tensor.spec.shape), list(mine[name].spec.shape)
                if shape != wanted and label not in differing:
                    differing.add(label)
                    if not self._parts.recipe.pad_experts:
                        what = f"{label} has {self.block(layer)}.{name} {shape}, the base {wanted}"
                        fix = "Use fine-tunes of the base, or pad_experts: true."
                        findings.error(what, fix, expert.path)
        if not differing or not self._parts.recipe.pad_experts:
            return
        own = self._width_of(base, 0)
        widths = {own, *(self._width_of(e.models[layer], layer) for e, layer in self._served())}
        self._width = max(widths)
        keys = [key for key in WIDTHS if base.config.get(key, "") in (own, None)]
        if reason := self._no_zeros(base, own, widths, keys):
            what = f"experts of unequal width: {reason}"
            findings.error(what, "Use experts as wide as the base.", (*path, "pad_experts"))
        self.resized = dict.fromkeys(keys, self._width)

    def _width_of(self, model: Model, layer: int) -> int:
        """Return the width of an MLP: what its last matrix reads."""
        for name, tensor in self._found[model.label][layer].items():
            shape = tensor.spec.shape
            if _OUTPUT.match(name) and len(shape) == 2:
                return shape[1] if shape[0] == self._hidden else shape[0]
        return 0

    def _no_zeros(self, base: Model, own: int, widths: set[int], keys: list[str]) -> str:
        """Return why zeros cannot widen the MLPs, or ""."""
        kind = base.config["model_type"]
        if not own or not keys:
            return f"the config of a {kind} model does not say how wide its MLPs are"
        if alike := widths & {self._hidden, self._hidden // 2}:
            return f"a width of {min(alike)} cannot be told from the hidden size {self._hidden}"
        norms = [n for n, t in self._found[base.label][0].items() if t.spec.shape == (own,)]
        if any("norm" in name for name in norms):
            return f"a {kind} model normalises over the width, so zeros would change it"
        return ""

    def dense(self, layer: int) -> Tensors:
        """Return the MLP of a layer without experts: the base's, as wide as all are."""
        return self._wide(self._parts.base, layer, 1.0)

    def expert(self, expert: ExpertParts, layer: int) -> Tensors:
        """Return the MLP of an expert, as wide as all are."""
        return self._wide(expert.models[layer], layer, expert.entry.residual_scale)

    def _wide(self, model: Model, layer: int, factor: float) -> Tensors:
        made = {}
        width = self._width_of(model, layer)
        for name, tensor in self._found[model.label][layer].items():
            # Of the base, for an expert may be stored in another dtype.
            dtype = self._parts.dtype or self._found[self._parts.base.label][layer][name].spec.dtype
            if not tensor.spec.dtype.mergeable:
                dtype = tensor.spec.dtype
            tensor = scaled(tensor, factor) if _OUTPUT.match(name) else tensor
            made[name] = _padded(tensor, dtype, width, self._width or width)
        return made


def _padded(tensor: PlannedTensor, dtype: DType, width: int, wanted: int) -> PlannedTensor:
    """Return a tensor of an MLP with zeros for all of the width that it lacks.

    A dimension of twice the width is two matrices, one after the other, each filled up.
    """
    shape = tensor.spec.shape
    if width == wanted or not shape:
        parts: list[Piece] = [(e, TensorSpec(dtype, s.shape)) for e, s in pieces(tensor)]
        return joined(tensor.name, parts, shape)
    if len(shape) == 2 and shape[1] == width:
        spec = TensorSpec(dtype, (shape[0], wanted))
        return PlannedTensor(tensor.name, spec, Columns((tensor.expr,), wanted))
    if shape[0] not in (width, 2 * width):
        return joined(tensor.name, [(tensor.expr, TensorSpec(dtype, shape))], shape)
    rest, count = shape[1:], shape[0] // width
    zeros = (Fill(0.0), TensorSpec(dtype, (wanted - width, *rest)))
    parts = []
    for part in range(count):
        rows = Rows(tensor.expr, part * width, width) if count > 1 else tensor.expr
        parts += [(rows, TensorSpec(dtype, (width, *rest))), zeros]
    return joined(tensor.name, parts, (count * wanted, *rest))

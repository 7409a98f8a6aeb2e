"""Owns turning one place of several models into one merged tensor: parameters, shapes, dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moeforge import catalog, methods
from moeforge.errors import Path, nearest
from moeforge.methods import REQUIRED, Method
from moeforge.methods._random import derive
from moeforge.planners.align import Vocabulary, is_vocabulary
from moeforge.planners.model import Findings, Model, listing
from moeforge.planners.vocab import mismatch
from moeforge.plans import Expr, Merge, PlannedTensor, Same
from moeforge.recipe.parameters import (
    ParameterError,
    Scope,
    Setting,
    coerce,
    resolve,
    unused_filters,
)
from moeforge.tensors import BY_NAME, TensorSpec, promote

Seed = tuple[int, ...]
"""Seed of the outermost recipe that gives one, and the number of the inline recipe below it."""
_WITHOUT_NOTE = {"int8_mask"}
"""Without effect by design: it is about memory only, and every second recipe has it."""
_SHARES = {"density", "gamma", "select_topk"}
"""Parameters that say how many of a tensor's elements are meant, as a share of all."""


@dataclass(frozen=True)
class Slot:
    """One input of a merged tensor.

    Attributes:
        model: the model it comes from.
        name: its name there.
        own: parameters that the recipe gives this input alone.
    """

    model: Model
    name: str
    own: Scope


@dataclass
class Combiner:
    """Merges tensors of models by one method of one recipe, collecting what is wrong.

    Attributes:
        word: the method, as the recipe names it.
        dtype: dtype of the result; None for the inputs' own.
        path: where the recipe stands, for messages.
        seed: what random masks follow from, with the tensor's name and the input's number.
        vocabulary: how tensors with a vocabulary axis are aligned; None leaves them as they are.
    """

    word: str
    dtype: str | None
    path: Path
    findings: Findings
    notes: Findings
    seed: Seed = ()
    vocabulary: Vocabulary | None = None
    used: set[Path] = field(default_factory=set)
    scopes: list[Scope] = field(default_factory=list)
    _misfits: set[Path] = field(default_factory=set)
    _problems: set[str] = field(default_factory=set)
    _before: int = 0

    def __post_init__(self) -> None:
        self._before = len(self.findings)

    @property
    def method(self) -> Method:
        """The method."""
        return methods.load(self.word)

    def check_scopes(self, scopes: Sequence[Scope], *, per_input: bool) -> None:
        """Report parameters that no method has, and note those that this method does not use."""
        known = {name for word in catalog.names("methods") for name in methods.load(word).params}
        for scope in scopes:
            self.scopes.append(scope)
            for name in scope.settings:
                path = (*scope.path, name)
                if name not in known:
                    hint = nearest(name, known) or f" Known: {', '.join(sorted(known))}."
                    self.findings.error(f'unknown parameter "{name}"{hint}', path=path)
                    continue
                if name not in self.method.params:
                    self.notes.error(
                        f'method {self.word} has no parameter "{name}"; it is unused', path=path
                    )
                    continue
                self._check_values(name, scope.settings[name], path)
                if self.method.params[name].unused and name not in _WITHOUT_NOTE:
                    self.notes.error(f'"{name}" has no effect in {self.word}', path=path)
                elif per_input and self.method.params[name].scope == "shared":
                    what = f'"{name}" is one value for all inputs of {self.word}; it is unused here'
                    self.notes.error(what, "Move it to the parameters of the merge.", path)

    def _check_values(self, name: str, setting: Setting, path: Path) -> None:
        """Report values of another type than the method declares, and shares that are none."""
        kind = self.method.params[name].kind
        for condition in setting:
            values = condition.value
            for value in values if isinstance(values, tuple) else (values,):
                try:
                    number = coerce(value, kind)
                except ParameterError as error:
                    self.findings.error(str(error), path=path)
                    continue
                if name in _SHARES and not 0 <= float(number) <= 1:
                    what = f"{name} is a share of a tensor's elements, got {value}"
                    fix = "Give a number from 0 to 1."
                    if float(number) < 0:
                        self.findings.error(what, fix, path)
                    else:  # as in mergekit
                        self.notes.warn(f"{what}, which counts as 1", fix, path)

    def check_inputs(self, count: int, base: int | None, path: Path) -> None:
        """Report too few or too many inputs, and a missing base."""
        fewest, most = self.method.inputs
        optional = self.method.base == "optional"
        if optional and base is not None:
            count -= 1
        if count < fewest or (most is not None and count > most):
            wanted = (
                f"{fewest}"
                if fewest == most
                else f"at least {fewest}"
                if most is None
                else f"{fewest} to {most}"
            )
            said = (
                f"{self.word} takes {wanted} model{'' if wanted == '1' else 's'}, here are {count}"
            )
            counts = "does not count" if optional else "counts"
            self.findings.error(said, f"A base_model {counts} as one of them.", path)
        if self.method.base == "required" and base is None:
            what = f"{self.word} needs a base_model that is one of its inputs"
            self.findings.error(what, "Add base_model: with the model to start from.", path)

    def tensor(
        self,
        name: str,
        slots: Sequence[Slot],
        shared: Sequence[Scope],
        base: int | None,
        position: float,
    ) -> PlannedTensor | None:
        """Return output tensor `name`, or None where something is wrong with it.

        Args:
            name: its name in the output.
            slots: inputs in the order of the recipe.
            shared: scopes that hold for all inputs, most specific first.
            base: index of the base among `slots`.
            position: place for gradients, from 0 to 1.
        """
        first = self.method.base != "none" and base is not None
        if first and base is not None:
            slots = [slots[base], *slots[:base], *slots[base + 1 :]]
        tensors = [slot.model.tensors[slot.name] for slot in slots]
        if self.vocabulary is not None:
            tensors = self.vocabulary.align([(slot.model, slot.name) for slot in slots])
        shapes = {tensor.spec.shape for tensor in tensors}
        if len(shapes) > 1:
            self._report_shapes(slots)
            return None
        params = self._params(name, slots, shared, position, first)
        if params is None:
            return None
        dtype = promote(tensor.spec.dtype for tensor in tensors)
        expr = tensors[0].expr
        copied = self.word == "passthrough" and params["scale"] == (None,)
        alone = self.method.base == "required" and len(tensors) == 1
        if not copied and not alone:
            found = self._merged(name, tensors, params)
            if found is None:
                return None
            expr = found
        if self.dtype and dtype.mergeable:
            dtype = BY_NAME[self.dtype]
        return PlannedTensor(name, TensorSpec(dtype, shapes.pop()), expr)

    def _merged(
        self, name: str, tensors: Sequence[PlannedTensor], params: dict[str, object]
    ) -> Expr | None:
        exprs = tuple(tensor.expr for tensor in tensors)
        foreign = [tensor.spec.dtype for tensor in tensors if not tensor.spec.dtype.mergeable]
        alike = len({tensor.spec.dtype for tensor in tensors}) == 1
        if foreign and alike and not foreign[0].name.startswith("float"):
            return Same(exprs) if len(exprs) > 1 else exprs[0]
        if foreign:
            what = f"{name} is {foreign[0]}, which {self.word} cannot compute with"
            fix = "Only floating-point tensors, or equal integers, can be merged."
            self.findings.error(what, fix, self.path)
            return None
        problem = self.method.check(params) if self.method.check else ""
        if problem:
            if problem not in self._problems:
                self._problems.add(problem)
                self.findings.error(f"{problem} (first seen at {name})", path=self.path)
            return None
        if self.method.random:
            params["key"] = derive(*self.seed, name)
        return Merge(self.word, exprs, tuple(params.items()))

    def _params(
        self,
        name: str,
        slots: Sequence[Slot],
        shared: Sequence[Scope],
        position: float,
        base_first: bool,
    ) -> dict[str, object] | None:
        params: dict[str, object] = {}
        for word, param in self.method.params.items():
            kind, default = param.kind, param.default
            # A base that is used as one takes no values of such a parameter.
            spared = base_first and param.scope == "non_base"
            asked = slots[1:] if spared else slots
            try:
                if param.scope == "shared":
                    values = [resolve(word, shared, name, position, kind, self.used)]
                else:
                    values = [
                        resolve(word, (slot.own, *shared), slot.name, position, kind, self.used)
                        for slot in asked
                    ]
            except ParameterError as error:
                self.findings.error(str(error), path=getattr(error, "path", self.path))
                return None
            if default is REQUIRED and None in values:
                shares = param.scope == "shared"
                self._report_missing(word, name, [] if shares else asked, values)
                return None
            filled = [default if value is None else value for value in values]
            if param.scope == "shared":
                params[word] = filled[0]
            else:
                params[word] = (None, *filled) if spared else tuple(filled)
        return params

    def _report_missing(
        self, word: str, name: str, slots: Sequence[Slot], values: Sequence[object]
    ) -> None:
        """Report that parameter `word` is not set: for some `slots`, or (none given) for all."""
        missing = [((*self.path, "parameters"), "")]
        if slots:
            missing = [
                (slot.own.path[:-1], f" for {slot.model.label}")
                for slot, value in zip(slots, values, strict=True)
                if value is None
            ]
        for path, whose in missing:
            fix = f"Add parameters: {{{word}: …}}."
            if path[-1:] == ("base_model",):  # it takes no parameters there
                fix = f"List it in models with its own {word}."
            if not any(f.path == path and f.fix == fix for f in self.findings):
                what = f"{self.word} needs the parameter {word}{whose} (first missed at {name})"
                self.findings.error(what, fix, path)

    def _report_shapes(self, slots: Sequence[Slot]) -> None:
        first = slots[0]
        mine = first.model.tensors[first.name].spec.shape
        whose = f"{list(mine)} in {first.model.label}"
        for slot in slots[1:]:
            theirs = slot.model.tensors[slot.name].spec.shape
            if mine == theirs:
                continue
            fix = "Merge only models of one size."
            if mine[1:] == theirs[1:] and is_vocabulary(first.model, first.name):
                said = mismatch([slot.model for slot in slots])
                if said and not any(finding.what == said[0] for finding in self.findings):
                    self.findings.error(*said, self.path)
                if said:
                    continue
            path = slot.own.path[:-1]  # of the entry, not of its parameters
            # One message for each model is enough: the rest differs for the same reason.
            if path not in self._misfits:
                self._misfits.add(path)
                what = f"{slot.name} is {list(theirs)} in {slot.model.label}, but "
                what += whose if slot.name == first.name else f"{first.name} is {whose}"
                self.findings.error(what, fix, path)

    def finish(self) -> None:
        """Report filters that matched no tensor."""
        if len(self.findings) > self._before:
            return  # a filter may have missed only because planning stopped before its tensor
        for path, word in unused_filters(self.scopes, self.used):
            if path[-2] not in self.method.params:
                continue  # noted already: the whole parameter is unused
            what = f'filter "{word}" decides no tensor'
            fix = "Filters match plain parts of tensor names, such as self_attn, mlp, layers.3."
            self.findings.error(what, fix, path)


def missing_tensors(models: Sequence[Model], findings: Findings, path: Path) -> list[str]:
    """Report tensors that some models have and others lack; return the names all have."""
    everything: dict[str, None] = {}
    for model in models:
        everything.update(dict.fromkeys(model.tensors))
    common = []
    lacking: dict[str, list[str]] = {}
    for name in everything:
        absent = [model.label for model in models if name not in model.tensors]
        for label in absent:
            lacking.setdefault(label, []).append(name)
        if not absent:
            common.append(name)
    for label, names in lacking.items():
        what = f"{label} lacks {len(names)} tensors that other inputs have: {listing(names)}"
        findings.error(what, "Merge only models of one architecture.", path)
    return common

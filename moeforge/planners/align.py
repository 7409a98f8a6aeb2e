"""Owns aligning: the rows of several models' embeddings in the order of the result's tokens.

Knows which model has which token in which row; which tokens the result has is decided in
`moeforge.planners.vocab`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from moeforge.configs import Config
from moeforge.errors import Path
from moeforge.planners.model import Findings, Model, is_input, listing
from moeforge.plans import Gather, PlannedTensor, RowTable
from moeforge.vocabulary import Tokens
from moeforge.vocabulary.change import TokenizerChange, renumber

if TYPE_CHECKING:
    from numpy.typing import NDArray

_OTHER_AXIS = re.compile(r"(^|\.|_)(pos|position|positions|wpe|token_type|segment|type)(_|\.|$)")


def _config_size(model: Model) -> int | None:
    config = model.config
    nested = config.get("text_config")
    size = config.get("vocab_size", nested.get("vocab_size") if isinstance(nested, dict) else None)
    return size if isinstance(size, int) else None


def rows(model: Model) -> int | None:
    """Return the number of rows of the model's embeddings, or None where nothing says it."""
    found = [
        tensor.spec.shape[0]
        for name, tensor in model.tensors.items()
        if is_input(name) and len(tensor.spec.shape) == 2 and not _OTHER_AXIS.search(name)
    ]
    said = _config_size(model)
    return said if said in found else next(iter(found), said)


def is_vocabulary(model: Model, name: str) -> bool:
    """Say whether the first axis of tensor `name` is the vocabulary: embeddings, heads, biases."""
    return _has_rows(model, name, rows(model))


def _has_rows(model: Model, name: str, count: int | None) -> bool:
    """Say whether the first axis of tensor `name` is the vocabulary of `count` tokens."""
    shape = model.tensors[name].spec.shape
    if not shape or shape[0] != count or model.layers.split(name) is not None:
        return False
    matrix = len(shape) == 2 and not _OTHER_AXIS.search(name)
    return "norm" not in name.lower() and (matrix or (len(shape) == 1 and name.endswith("bias")))


Choice = tuple["str | None", int]
"""A row of the model with this label; None for a row of zeros."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Where the rows of the result may come from; C ids, real rows before the padding.

    Attributes:
        own: for each model, by label, the row of each id, -1 where it lacks it; integers [C].
        sizes: rows of each model's embeddings.
        names: the token of each id; None for an id without one.
        base: label of the base.
        choices: rows that the recipe chooses, by id.
        forced: the ids whose choice also replaces the rows of models that have the token.
    """

    own: Mapping[str, NDArray[Any]]
    sizes: Mapping[str, int]
    names: Sequence[str | None]
    base: str
    choices: Mapping[int, Choice]
    forced: Sequence[int]


_Default = tuple["NDArray[Any]", "NDArray[Any]", "tuple[tuple[tuple[int, int], ...], ...]"]
"""`source`, `row` and `means` of a RowTable."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokenizer of a merge, and what it means for the tensors.

    Attributes:
        change: what becomes of the tokenizer's files.
        before: the base's tokenizer, for the ids in its config; None as `rows`.
        rows: None where the vocabulary stays, and only the chat template changes.
        path: where the recipe speaks of it.
        findings: gets what is wrong with single tokens.
        notes: gets what is worth knowing of them.
    """

    change: TokenizerChange
    before: Tokens | None = None
    rows: Rows | None = None
    path: Path = ()
    findings: Findings = field(default_factory=Findings)
    notes: Findings = field(default_factory=Findings)
    _tables: dict[tuple[str, ...], dict[str, tuple[RowTable, tuple[str, ...]] | None]] = field(
        default_factory=dict
    )

    @property
    def size(self) -> int | None:
        """Rows of the result's embeddings; None where they stay as they are."""
        return None if self.rows is None else self.change.size

    def config(self, config: Config) -> Config:
        """Return the base's config.json with the vocabulary's size and ids of special tokens."""
        tokens, size = self.change.tokens, self.size
        if self.before is None or tokens is None or size is None:
            return config
        result = renumber(config, self.before, tokens, size)
        nested = config.get("text_config")
        if isinstance(nested, dict):
            nested = renumber(nested, self.before, tokens, size)
            result["text_config"] = {**nested, "vocab_size": size}
        if "vocab_size" in config or not isinstance(nested, dict):
            result["vocab_size"] = size
        return result

    def align(self, slots: Sequence[tuple[Model, str]]) -> list[PlannedTensor]:
        """Return the inputs of one output tensor, all with the rows of the result.

        Args:
            slots: each input's model and the name of its tensor there.

        A tensor without a vocabulary axis, or whose rows are the result's already, is returned as
        it is. Whether the others' further dimensions agree is checked by whoever merges them.
        """
        tensors = [model.tensors[name] for model, name in slots]
        if self.rows is None:
            return tensors
        sizes = self.rows.sizes
        if not all(_has_rows(model, name, sizes[model.label]) for model, name in slots):
            return tensors
        if len({tensor.spec.shape[1:] for tensor in tensors}) > 1:
            return tensors
        by_label = {model.label: t for (model, _), t in zip(slots, tensors, strict=True)}
        labels = tuple(by_label)
        if labels not in self._tables:
            self._tables[labels] = self._make_tables(self.rows, labels)
        aligned = []
        for (model, _), tensor in zip(slots, tensors, strict=True):
            found = self._tables[labels][model.label]
            if found is not None:
                table, used = found
                shape = (len(table.source) + table.padding, *tensor.spec.shape[1:])
                expr = Gather(tuple(by_label[label].expr for label in used), table)
                tensor = replace(tensor, spec=replace(tensor.spec, shape=shape), expr=expr)
            aligned.append(tensor)
        return aligned

    def _make_tables(
        self, rows: Rows, labels: tuple[str, ...]
    ) -> dict[str, tuple[RowTable, tuple[str, ...]] | None]:
        """Return for each model its table and the models it takes rows of; None: as it is."""
        import numpy as np

        source, row, means = self._default(rows, labels)
        padding = (self.change.size or 0) - len(rows.names)
        forced = np.zeros(len(rows.names), bool)
        forced[list(rows.forced)] = True
        tables: dict[str, tuple[RowTable, tuple[str, ...]] | None] = {}
        for index, label in enumerate(labels):
            own = rows.own[label]
            kept = (own >= 0) & ~forced
            its_source = np.where(kept, index, source)
            its_row = np.where(kept, own, row)
            same = np.array_equal(its_row, np.arange(rows.sizes[label]))
            if same and not padding and (its_source == index).all():
                tables[label] = None
            else:
                tables[label] = _compact(its_source, its_row, means, padding, labels)
        return tables

    def _default(self, rows: Rows, labels: tuple[str, ...]) -> _Default:
        """Return the rows for models that lack a token, as a table over all of `labels`.

        The recipe's choice comes first; then the base's row; then the mean over all models that
        have the token, which is the row itself where only one has it; then zeros.
        """
        import numpy as np

        own = np.stack([rows.own[label] for label in labels])
        has = own >= 0
        count = has.sum(axis=0)
        source = has.argmax(axis=0)
        several = count > 1
        if rows.base in labels:
            in_base = has[labels.index(rows.base)]
            source = np.where(in_base, labels.index(rows.base), source)
            several &= ~in_base
        row = np.take_along_axis(own, source[None], axis=0)[0]
        mixed = np.flatnonzero(several)
        source[mixed], row[mixed] = RowTable.MEAN, np.arange(len(mixed))
        means = tuple(
            tuple((model, at) for model, at in enumerate(column) if at >= 0)
            for column in own[:, mixed].T.tolist()
        )
        nowhere = count == 0
        source[nowhere], row[nowhere] = RowTable.ZERO, 0
        for index, (label, at) in rows.choices.items():
            token = rows.names[index]
            if label is not None and label not in labels:
                what = f"{label}, which the token {token!r} comes from, is no input of all tensors"
                fix = "Take it from a model that is merged in every slice."
                self.findings.error(f"{what} with a vocabulary", fix, self.path)
                continue
            source[index] = RowTable.ZERO if label is None else labels.index(label)
            row[index], nowhere[index] = at, False
        lost = [
            name for i in np.flatnonzero(nowhere).tolist() if (name := rows.names[i]) is not None
        ]
        if lost:
            what = f"no model here has the tokens {listing(map(repr, lost))}: {', '.join(labels)}"
            self.notes.error(what, "Their rows are zeros.", self.path)
        return source, row, means


def _compact(
    source: NDArray[Any],
    row: NDArray[Any],
    means: tuple[tuple[tuple[int, int], ...], ...],
    padding: int,
    labels: tuple[str, ...],
) -> tuple[RowTable, tuple[str, ...]]:
    """Return the table over those models alone that it takes rows of, so that no more are read."""
    import numpy as np

    if (source == RowTable.MEAN).any():
        return RowTable(source, row, means, padding), labels
    used = sorted({0} if (source < 0).all() else set(source[source >= 0].tolist()))
    place = np.zeros(len(labels), source.dtype)
    place[used] = np.arange(len(used))
    source = np.where(source >= 0, place[source], source)
    return RowTable(source, row, (), padding), tuple(labels[index] for index in used)

"""Owns planning the vocabulary of a merge: its tokens, their sources, its chat template.

What a tokenizer is, is `moeforge.vocabulary`'s; row tables are made in `moeforge.planners.align`.

A row of the result without a token (padding, or a gap between ids) is the row of the tokenizer's
own model where it has one there, so that padding is kept as far as the result has room for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moeforge.errors import MoeforgeError, Path, nearest
from moeforge.planners.align import Choice, Rows, Vocabulary, is_vocabulary, rows
from moeforge.planners.chat import chosen_template
from moeforge.planners.model import Findings, Model, listing
from moeforge.recipe.vocabulary import ModelToken, Tokenizer, Zero
from moeforge.vocabulary import Tokens, present, read
from moeforge.vocabulary.change import ID_ENDINGS, TokenizerChange
from moeforge.vocabulary.compose import compose, conflicts, extend, union, usable

__all__ = ["Vocabulary", "is_vocabulary", "mismatch", "plan_vocabulary"]

Resolve = Callable[[Any, Path], "Model | None"]
Entry = tuple[Any, Model]
"""A model as the recipe names it, and what it is."""


def mismatch(models: Sequence[Model]) -> tuple[str, str] | None:
    """Return what to say, and what to do, where vocabularies differ and the recipe chooses none."""
    counts = {model.label: rows(model) for model in models}
    if len(set(counts.values())) < 2:
        return None
    said = ", ".join(f"{label} has {count} rows" for label, count in counts.items())
    fix = (
        "Say which tokens the result has: tokenizer: {source: base} (those of the base), "
        f"{{source: union}} (all of them), or a model, {{source: {models[-1].label}}}."
    )
    return f"the vocabularies differ: {said}", fix


def tokens_of(model: Model) -> Tokens:
    """Return the tokenizer of `model`.

    Raises:
        SourceError: it has none that can be used.
    """
    if model.tokenizer is not None and model.tokenizer.tokens is not None:
        return model.tokenizer.tokens
    return read(model.donor.folder, model.label)


# --- planning ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Planning:
    """What the steps of planning share."""

    settings: Tokenizer
    inputs: Sequence[Entry]
    base: Model
    path: Path
    findings: Findings
    notes: Findings

    def tokenizers(self, owner: Model) -> dict[str, Tokens] | None:
        """Return the tokenizers of inputs and `owner` by label; None after reporting an error."""
        models = {model.label: model for model in (owner, *(model for _, model in self.inputs))}
        found: dict[str, Tokens] = {}
        for label, model in models.items():
            alike = owner.label in found and rows(model) == rows(owner)
            if alike and model.tokenizer is None and not present(model.donor.folder):
                what = f"{label} has no tokenizer; it is taken to have that of {owner.label}"
                self.notes.error(what, path=self.path)
                found[label] = found[owner.label]
                continue
            try:
                found[label] = tokens_of(model)
            except MoeforgeError as error:
                self.report(error)
        return found if len(found) == len(models) else None

    def report(self, error: MoeforgeError) -> None:
        """Add what `error` says to the findings."""
        for finding in error.findings:
            self.findings.error(finding.what, finding.fix, self.path)

    def named(self, entry: Any, path: Path) -> Model | None:
        """Return the input that the recipe calls `entry`."""
        for known, model in self.inputs:
            if known == entry:
                return model
        what = f"{entry} is not one of the models that are merged here"
        self.findings.error(what, "Tokens can only come from those.", path)
        return None

    def result(self, owner: Model, tokenizers: Mapping[str, Tokens]) -> Tokens | None:
        """Return the tokenizer of the result, which starts from that of `owner`."""
        sizes = {model.label: rows(model) or 0 for _, model in (*self.inputs, (None, owner))}
        first = tokenizers[owner.label]
        others = {label: tokens for label, tokens in tokenizers.items() if label != owner.label}
        joined = self.settings.source == "union"
        if not self._spelt_alike(owner, tokenizers) and joined:
            return None
        counted = [(tokens, sizes[label]) for label, tokens in others.items()]
        ids = usable(first, sizes[owner.label])
        if joined:
            ids = union((first, sizes[owner.label]), counted)
        extend(ids, self.settings.tokens)
        self._note_lost(first, ids, sizes[owner.label])
        for label, differing in conflicts([first, *others.values()], ids).items():
            what = f"{label} matches {listing(map(repr, differing))} in text in another way"
            self.notes.error(what, "The first model that adds a token decides.", self.path)
        try:
            return compose(first, list(others.values()), ids, ordinary=joined)
        except MoeforgeError as error:
            self.report(error)
            return None

    def _spelt_alike(self, owner: Model, tokenizers: Mapping[str, Tokens]) -> bool:
        """Say whether equal strings mean equal text; report where not: an error for a union."""
        kind = tokenizers[owner.label].kind
        joined = self.settings.source == "union"
        others = {label: t.kind for label, t in tokenizers.items() if t.kind != kind}
        for label, other in others.items():
            what = f"{label} has a {other} tokenizer, {owner.label} a {kind} one"
            fix = "Their tokens are spelt differently; equal strings may mean different text."
            if joined:
                self.findings.error(what, f"{fix} Use tokenizer: {{source: base}}.", self.path)
            else:
                self.notes.error(what, fix, self.path)
        return not others

    def _note_lost(self, first: Tokens, ids: Mapping[str, int], count: int) -> None:
        lost = [token for token in first.ids if token not in ids]
        if lost:
            what = f"{first.label}: its {count} rows do not reach {listing(map(repr, lost))}"
            self.notes.error(what, "Its tokenizer's tokens without a row are left out.", self.path)

    def choices(self, tokenizers: Mapping[str, Tokens]) -> dict[str, Choice]:
        """Return the configured source of tokens: label and row, or None for zeros."""
        found: dict[str, Choice] = {}
        for token, setting in self.settings.tokens.items():
            source, path = setting.source, (*self.path, "tokens", token, "source")
            if source is None:
                continue
            if isinstance(source, Zero):
                found[token] = (None, 0)
                continue
            other = isinstance(source, ModelToken)
            model = self.named(source.model if other else source, path)
            if model is None:
                continue
            wanted = source.token if other and source.token is not None else token
            row = source.token_id if other and source.token_id is not None else None
            if row is None:
                row = tokenizers[model.label].ids.get(wanted)
            count = rows(model) or 0
            if row is None or row >= count:
                asked = f"row {row}" if other and source.token is None else f"a row for {wanted!r}"
                what = f"{model.label} does not have {asked}; it has {count} rows"
                self.findings.error(what, "Name a token that it has.", path)
            else:
                found[token] = (model.label, row)
        return found

    def lay_out(
        self,
        owner: Model,
        tokenizers: Mapping[str, Tokens],
        tokens: Tokens,
        size: int,
        choices: Mapping[str, Choice],
    ) -> Rows:
        """Say in which row of which model each token lies."""
        import numpy as np

        sizes = {model.label: rows(model) or 0 for _, model in self.inputs}
        count = max(tokens.ids.values(), default=-1) + 1
        count = max(count, min(size, sizes.get(owner.label, 0)))
        names: list[str | None] = [None] * count
        for token, index in tokens.ids.items():
            names[index] = token
        free = np.array([index for index, name in enumerate(names) if name is None], np.int64)
        holders = {}
        for label, has in sizes.items():
            ids = tokenizers[label].ids
            own = np.array([-1 if name is None else ids.get(name, -1) for name in names], np.int64)
            own[own >= has] = -1
            if ids == tokenizers[owner.label].ids:  # a row without a token means the same here
                own[free[free < has]] = free[free < has]
            holders[label] = own
        forced = [tokens.ids[t] for t, setting in self.settings.tokens.items() if setting.force]
        chosen = {tokens.ids[token]: choice for token, choice in choices.items()}
        return Rows(holders, sizes, names, self.base.label, chosen, forced)


def plan_vocabulary(
    settings: Tokenizer | None,
    chat_template: str | None,
    inputs: Sequence[Entry],
    base: Model,
    resolve: Resolve,
    path: Path,
    findings: Findings,
    notes: Findings,
) -> Vocabulary | None:
    """Plan tokenizer and vocabulary of a merge or stack.

    Args:
        settings: what the recipe says of the tokenizer.
        chat_template: what the recipe says of the chat template.
        inputs: every input once, in the order of the recipe, the base among them.
        base: the model that everything but weights comes from.
        resolve: finds a model that is no input, but lends its tokenizer.
        path: where the recipe stands.
        findings: gets what is wrong.
        notes: gets what is worth knowing.

    Returns:
        None where nothing was asked for, or something was found wrong.
    """
    before = len(findings)
    models = [model for _, model in inputs]
    template = chosen_template(chat_template, models, base, (*path, "chat_template"), findings)
    inherited = base.tokenizer or TokenizerChange()
    if settings is None:
        if template is None or len(findings) > before:
            return None
        return Vocabulary(replace(inherited, chat_template=template))
    planning = _Planning(settings, inputs, base, (*path, "tokenizer"), findings, notes)
    owner: Model | None = base
    if settings.source not in ("union", "base"):
        known = [model for entry, model in inputs if entry == settings.source]
        here = (*path, "tokenizer", "source")
        owner = known[0] if known else resolve(settings.source, here)
        if owner is None and (hint := nearest(str(settings.source), ("base", "union"))):
            findings.error(f"{settings.source} is taken for a model{hint}", path=here)
    tokenizers = planning.tokenizers(owner) if owner else None
    if owner is None or tokenizers is None:
        return None
    tokens = planning.result(owner, tokenizers)
    choices = planning.choices(tokenizers)
    if tokens is None or len(findings) > before:
        return None
    old = tokenizers[base.label]
    if template is None and tokens.folder == old.folder:
        template = inherited.chat_template
    count = max(tokens.ids.values(), default=-1) + 1
    multiple = settings.pad_to_multiple_of or 1
    size = -(-count // multiple) * multiple
    change = TokenizerChange(inherited.before or old, tokens, size, template)
    laid = planning.lay_out(owner, tokenizers, tokens, size, choices)
    vocabulary = Vocabulary(change, old, laid, planning.path, findings, notes)
    if owner in models:
        _note_padding(owner, count, size, notes, planning.path)
    _note_moved(vocabulary, base, notes, planning.path)
    return vocabulary


def _note_padding(owner: Model, count: int, size: int, notes: Findings, path: Path) -> None:
    """Say that rows without a token are lost, and how they would not be."""
    has = rows(owner) or 0
    if has <= size:
        return
    fix = f"Quantisations and adapters that were made for {owner.label} do not fit the result."
    powers = [2**n for n in range(1, 13) if -(-count // 2**n) * 2**n == has]
    if powers:
        fix = f"tokenizer: {{pad_to_multiple_of: {powers[0]}}} keeps them."
    what = (
        f"{owner.label} has {has} rows, the tokenizer {count} tokens: {has - size} padding rows go"
    )
    notes.error(what, fix, path)


def _note_moved(vocabulary: Vocabulary, base: Model, notes: Findings, path: Path) -> None:
    """Say which special tokens have other ids in the configs of the result."""
    configs = {"config.json": base.config}
    folder = base.donor.folder
    if folder is not None and (folder / "generation_config.json").exists():
        text = (folder / "generation_config.json").read_text(encoding="utf-8")
        configs["generation_config.json"] = json.loads(text)
    for file, config in configs.items():
        for key, new in vocabulary.config(config).items():
            if key.endswith(ID_ENDINGS) and new != config[key]:
                what = f"{key} is {config[key]} in the {file} of {base.label}"
                notes.error(what, f"It becomes {new}.", path)

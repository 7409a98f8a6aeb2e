"""Owns what a card is made from: plain facts, kept beside the model, so that no parent is needed.

The file may come from a stranger: what is in it is of the types below, or it is refused.
"""

from __future__ import annotations

import json
import types
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from moeforge.errors import Finding, SourceError
from moeforge.texts import read_text

NAME = "moeforge.card.json"
_FORMAT = 1
_MOST = 20_000_000
"""Bytes; a card of a thousand layers and experts stays far below."""


@dataclass(frozen=True)
class Parent:
    """A model or adapter that went in.

    Attributes:
        key: its name in the recipe.
        repo: its id on the Hub; empty for a folder.
        commit: the commit that was read, where it came from the Hub.
        roles: what it is in the output, in words.
        license: identifier that its card names; empty where it names none that the Hub knows.
        license_name: name of a licence of its own (`license: other`).
        license_link: where the text of that licence is.
        languages: codes of its languages, as its card says.
        datasets: ids of its datasets, as its card says.
    """

    key: str
    repo: str = ""
    commit: str = ""
    roles: tuple[str, ...] = ()
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """A merge method that was used: its word in recipes, and its main parameters in words."""

    word: str
    title: str
    paper: str
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Expert:
    """An expert: its model, the first prompts that the recipe writes out, and its prompt file."""

    label: str
    prompts: tuple[str, ...] = ()
    file: str = ""
    shared: bool = False


@dataclass(frozen=True)
class Mixture:
    """What makes a mixture of the experts; `gate` says in words what the gate mode does."""

    per_token: int
    gate_mode: str
    gate: str
    experts: tuple[Expert, ...]

    @property
    def copies(self) -> bool:
        """Whether all routed experts are one model."""
        routed = [expert.label for expert in self.experts if not expert.shared]
        return len(routed) > 1 and len(set(routed)) == 1


@dataclass(frozen=True)
class Engine:
    """Other software: its name, how it loads the model, and what is known of that.

    `command` is empty where it does not load it, or computes something else.
    """

    name: str
    command: str
    known: tuple[str, ...]


@dataclass(frozen=True)
class Chat:
    """The chat template: where it stands, whose it is, and which parents have another one."""

    file: str
    parents: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """All that a card tells, but for the recipe.

    Attributes:
        version: the moeforge that built the model.
        name: of the model.
        kind: "moe", "stack", "merge", "extraction" or "regrouping".
        architecture: class in transformers.
        model_type: the same as config.json names it.
        pipeline: the Hub's word for its task; empty where none is known.
        sentences: whether it is a sentence-transformers model.
        tokenizer: whether a tokenizer lies beside it.
        dtype: of the weights.
        parameters: all of them.
        active: those that each token passes through.
        nbytes: of all weights.
        code: files of program text that belong to it.
        parents: what went in.
        methods: how it was merged.
        mixture: None unless it is a mixture of experts.
        taken: which experts of another mixture it has, in words; empty where it has none.
        engines: other software that is known to load it, or not to.
        chat: None where there is no chat template.
        warnings: what the build warned of.
        tables: Markdown of what was measured.
        routing: Markdown of where a mixture sends tokens.
        tuned: Markdown of how the routers were trained.
        tuned_later: whether that was done after the build that the lock file tells of.
    """

    version: str
    name: str
    kind: str
    architecture: str
    model_type: str
    pipeline: str
    sentences: bool
    tokenizer: bool
    dtype: str
    parameters: int
    active: int
    nbytes: int
    code: tuple[str, ...] = ()
    parents: tuple[Parent, ...] = ()
    methods: tuple[Method, ...] = ()
    mixture: Mixture | None = None
    taken: str = ""
    engines: tuple[Engine, ...] = ()
    chat: Chat | None = None
    warnings: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    routing: str = ""
    tuned: str = ""
    tuned_later: bool = False


@dataclass(frozen=True)
class Record:
    """The facts, and what the card looked like when it was last written.

    Attributes:
        facts: what it was made from.
        metadata: its front matter, without what users changed in it.
        body: SHA-256 of the rest, without what users wrote between the markers.
    """

    facts: Facts
    metadata: dict[str, Any]
    body: str


def dump(record: Record) -> str:
    """Return the text of the file that keeps `record`."""
    data = {"card": _FORMAT, **asdict(record)}
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def read(folder: Path) -> Record | None:
    """Return what is kept in `folder`; None where nothing is.

    Raises:
        SourceError: the file is damaged, or of another format.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        data = json.loads(read_text(path, most=_MOST))
        if not isinstance(data, dict) or data.pop("card", None) != _FORMAT:
            raise ValueError(f"it is not of format {_FORMAT}")
        found: Record = _decoded(Record, data, "record")
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        what = f"{path}, which the card is made from, cannot be read: {reason}"
        raise SourceError(Finding(what, "Bring it back as the build made it.")) from None
    return found


def _decoded(kind: Any, value: Any, where: str) -> Any:
    """Return `value` of JSON as `kind`: a dataclass, a tuple, an optional or a plain type.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(kind, types.UnionType):
        (inner,) = (each for each in get_args(kind) if each is not types.NoneType)
        return None if value is None else _decoded(inner, value, where)
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_decoded(get_args(kind)[0], each, where) for each in value)
    if is_dataclass(kind) and isinstance(value, dict):
        if unknown := value.keys() - {field.name for field in fields(kind)}:
            raise ValueError(f"{where} has the unknown key {sorted(unknown)[0]!r}")
        hints = get_type_hints(kind)
        made = {key: _decoded(hints[key], each, key) for key, each in value.items()}
        try:
            return kind(**made)  # type: ignore[operator]  # a class, not an instance
        except TypeError as error:
            raise ValueError(f"{where} is incomplete: {error}") from None
    if (get_origin(kind) or kind) is not type(value):
        raise ValueError(f"{where} is {str(value)[:60]!r}")
    return value

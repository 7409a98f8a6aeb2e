"""Owns the documents that routers are tuned on: windows of text and prompts as token ids.

Knows tokenizers; knows no model.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeforge.errors import BuildError, Finding
from moeforge.gates._tokenize import tokenize
from moeforge.proof import heldout
from moeforge.recipe import Prompt, prompts

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""Label of a position that predicts nothing; torch's cross entropy leaves it out."""
_EVERY = 10
"""Of documents in order, the last of each so many is held out."""
_MOST_HELD_OUT = 128
"""Held-out documents; more of them would take longer than the training between two looks."""

Document = tuple[int, ...]
"""Token ids, two or more, beginning with BOS where the tokenizer has one."""


@dataclass(frozen=True)
class Documents:
    """What is trained on, and what decides when to stop."""

    training: tuple[Document, ...]
    heldout: tuple[Document, ...]


@dataclass(frozen=True)
class Batch:
    """Documents side by side, filled up on the right.

    Attributes:
        numbers: which documents they are.
        ids_BT: token ids; zeros after the end of a document. Nothing before them depends on them.
        labels_BT: the token after each, or IGNORED.
    """

    numbers: tuple[int, ...]
    ids_BT: Tensor
    labels_BT: Tensor

    def to(self, device: Any) -> Batch:
        """Return it on a torch device."""
        return Batch(self.numbers, self.ids_BT.to(device), self.labels_BT.to(device))


def of_text(tokenizer: Any, path: Path, window: int) -> list[Document]:
    """Return the text of `path` as documents of `window` tokens; the last may be shorter.

    Raises:
        BuildError: it cannot be read, or has no two tokens.
    """
    ids = heldout.tokenize(tokenizer, heldout.read_text(path))
    found = _cut(ids, tokenizer.bos_token_id, window)
    if not found:
        raise BuildError(Finding(f"{path} has no text to learn from", "Give another file."))
    return found


def of_prompts(tokenizer: Any, texts: Iterable[Prompt], window: int) -> list[Document]:
    """Return prompts as documents; one that is longer than `window` becomes several.

    Raises:
        SourceError: a prompt has no tokens, or needs a chat template that is not there.
    """
    found = []
    for prompt in tokenize(tokenizer, ((0, False, text) for text in texts), None):
        bos = prompt.ids[0] if prompt.first else None
        found += _cut(prompt.ids[prompt.first :], bos, window)
    return found


def of_prompt_file(tokenizer: Any, path: Path, window: int) -> list[Document]:
    """Return the prompts in file `path` as documents.

    Raises:
        BuildError: the file cannot be used.
    """
    try:
        return of_prompts(tokenizer, prompts.load(path), window)
    except ValueError as error:
        raise BuildError(Finding(str(error))) from None


def _cut(ids: Sequence[int], bos: int | None, window: int) -> list[Document]:
    return [tuple(row) for row in heldout.cut(ids, bos, window)]


def split(documents: Sequence[Document], given: Sequence[Document] = ()) -> Documents:
    """Return `documents` for training, and `given` for early stopping.

    Without `given`, every tenth of the documents is held out, the last of each ten in the order
    of the files, so that every part of them has its say; of fewer than ten the last one. Of more
    held-out documents than 128 as many are kept, evenly spaced.

    Raises:
        BuildError: there are fewer than two documents to divide, or none to train on.
    """
    training = list(documents)
    if not given:
        if len(training) < 2:
            what = "there is one document to train on, and none is left to stop by"
            raise BuildError(Finding(what, "Give more text, or held-out text of its own."))
        held = {n for n in range(len(training)) if n % _EVERY == _EVERY - 1}
        held = held or {len(training) - 1}
        given = [training[n] for n in sorted(held)]
        training = [document for n, document in enumerate(training) if n not in held]
    most = min(len(given), _MOST_HELD_OUT)
    spaced = tuple(given[n * len(given) // most] for n in range(most))
    return Documents(tuple(training), spaced)


def together(documents: Sequence[Document], numbers: Sequence[int]) -> Batch:
    """Return the documents of these numbers as one batch."""
    import torch

    chosen = [documents[number] for number in numbers]
    longest = max(map(len, chosen))
    ids_BT = torch.zeros(len(chosen), longest, dtype=torch.long)
    labels_BT = torch.full_like(ids_BT, IGNORED)
    for row, document in enumerate(chosen):
        ids_BT[row, : len(document)] = torch.tensor(document)
        labels_BT[row, : len(document) - 1] = torch.tensor(document[1:])
    return Batch(tuple(numbers), ids_BT, labels_BT)


def in_order(documents: Sequence[Document], size: int) -> Iterator[Batch]:
    """Yield all documents once, in order."""
    for start in range(0, len(documents), size):
        yield together(documents, range(start, min(start + size, len(documents))))


def draws(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Yield the numbers of the documents of each batch, without end.

    Every round has all `count` documents in an order of its own: `random.Random(f"tune {seed}")`
    shuffles their numbers for each round. Batches are taken from the rounds one after the other,
    and may span two.
    """
    shuffler, waiting = random.Random(f"tune {seed}"), list[int]()
    while True:
        while len(waiting) < size:
            order = list(range(count))
            shuffler.shuffle(order)
            waiting += order
        yield waiting[:size]
        del waiting[:size]

"""Owns what dense experts teach: for every document the predictions of the one that knows it best.

One teacher is in memory at a time, and runs every document once. Predictions lie in a file.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeforge.errors import BuildError, Finding, MoeforgeError
from moeforge.planners import Model
from moeforge.planners.model import from_source
from moeforge.planners.vocab import tokens_of
from moeforge.shown import show_size
from moeforge.sources import open_source
from moeforge.tuning.data import Batch, Document, together
from moeforge.tuning.objective import predictions
from moeforge.weights import Weights

if TYPE_CHECKING:
    from torch import Tensor, nn

Load = Callable[[], "nn.Module"]
_BYTES = 2
"""Per log-probability: float16, whose error is below 2⁻¹¹ of it. What is less probable than
exp(-11) is off by up to 0.01 nats, and hardly counts in a divergence."""
_LEAST = -6e4
"""Log-probability that float16 holds; its probability is zero all the same."""


def load_model(model: Model) -> Load:
    """Return how to load a dense model, checkpoint or inline recipe, in float32."""

    def load() -> nn.Module:
        from moeforge.forward import load_dense

        try:
            return load_dense(model.config, model.tensors, Weights(model).stored)
        except ValueError as error:
            raise BuildError(Finding(f"{model.label} cannot teach: {error}")) from error

    return load


def open_teachers(names: Sequence[str], mixture: Path, *, offline: bool = False) -> dict[str, Load]:
    """Return how to load dense models that teach a mixture.

    Args:
        names: folders or Hub ids.
        mixture: its folder.
        offline: use only what is in the local Hub cache.

    Raises:
        MoeforgeError: one is no checkpoint, or has another tokenizer than the mixture.
    """
    ids = tokens_of(from_source(open_source(str(mixture)))).ids
    found: dict[str, Load] = {}
    wrong: list[Finding] = []
    for name in names:
        try:
            model = from_source(open_source(name, offline=offline))
            same = tokens_of(model).ids == ids
        except MoeforgeError as error:
            wrong += error.findings
            continue
        if not same:
            what = f"{name} has another tokenizer than {mixture}"
            wrong.append(Finding(what, "Teach with models of the mixture's tokenizer."))
        found[name] = load_model(model)
    if wrong:
        raise BuildError(*wrong)
    return found


class Lessons:
    """Log-probabilities of the best teacher for each document.

    Args:
        teachers: how to load each in float32, by label.
        documents: what is trained on, by number.
        vocabulary: number of logits of the mixture.
        device: torch device that the teachers run on.
        progress: told the teachers done, and their number.

    Attributes:
        best: by number of the document the label of the teacher with the lowest loss on it; of
            equal ones the first.

    Raises:
        BuildError: a teacher has another vocabulary, none computes a finite loss on a document, or
            there is no room for the predictions.
    """

    def __init__(
        self,
        teachers: Mapping[str, Load],
        documents: Mapping[int, Document],
        vocabulary: int,
        device: Any = "cpu",
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._documents, self._vocabulary = documents, vocabulary
        self._places: dict[int, int] = {}
        rows = 0
        for number, document in documents.items():
            self._places[number] = rows * vocabulary * _BYTES
            rows += len(document) - 1
        _check_room(rows * vocabulary * _BYTES)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as this object
        self.best: dict[int, str] = {}
        losses = dict.fromkeys(documents, float("inf"))
        for done, (label, load) in enumerate(teachers.items()):
            progress(done, len(teachers))
            self._ask(label, load().to(device), losses)
        progress(len(teachers), len(teachers))
        if lost := documents.keys() - self.best.keys():
            what = f"no teacher computes a finite loss on document {min(lost)}"
            raise BuildError(Finding(what, "Check the dense experts; weights may be damaged."))

    def _ask(self, label: str, model: nn.Module, losses: dict[int, float]) -> None:
        """Keep the predictions of `model` on every document that it knows better than others."""
        import torch

        device = next(model.parameters()).device
        for number, document in self._documents.items():
            with torch.no_grad():
                logits_TV, labels_T = predictions(model, together([document], [0]).to(device))
            if logits_TV.shape[1] != self._vocabulary:
                what = f"{label} predicts {logits_TV.shape[1]} tokens, the mixture "
                fix = "Teach with models of the mixture's tokenizer."
                raise BuildError(Finding(f"{what}{self._vocabulary}", fix))
            told_TV = logits_TV.log_softmax(-1)
            loss = float(-told_TV.gather(1, labels_T[:, None]).mean())
            if loss < losses[number]:
                losses[number], self.best[number] = loss, label
                raw: Any = told_TV.clamp(min=_LEAST).half().cpu().contiguous().numpy()
                self._file.seek(self._places[number])
                self._file.write(memoryview(raw).cast("B"))

    def __call__(self, batch: Batch) -> Tensor:
        """Return log-probabilities [tokens, vocabulary] for the labelled tokens of `batch`."""
        import torch

        told = []
        for number in batch.numbers:
            rows = len(self._documents[number]) - 1
            self._file.seek(self._places[number])
            raw = bytearray(self._file.read(rows * self._vocabulary * _BYTES))
            told.append(torch.frombuffer(raw, dtype=torch.float16).reshape(rows, -1))
        # Rounding took them a little away from adding up to one.
        return torch.cat(told).float().log_softmax(-1)


def _check_room(needed: int) -> None:
    place = tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    if needed > free:
        what = (
            f"what the teachers predict takes {show_size(needed)} in {place}, "
            f"which has {show_size(free)} free"
        )
        raise BuildError(Finding(what, "Give less text, or set TMPDIR to a larger disk."))

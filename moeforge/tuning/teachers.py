"""Owns what dense experts teach: for every document the predictions of the one that knows it best.

One teacher is in memory at a time, and runs every document once. Predictions lie in a file.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moeforge.errors import BuildError, Finding, MoeforgeError
from moeforge.planners import Model
from moeforge.planners.model import from_source
from moeforge.planners.vocab import tokens_of
from moeforge.sources import open_source
from moeforge.tuning.data import IGNORED, Batch, Document, in_order
from moeforge.tuning.train import predictions
from moeforge.weights import Weights

if TYPE_CHECKING:
    from torch import Tensor, nn

Load = Callable[[], "nn.Module"]
_BYTES = 2
"""Per log-probability: float16, whose error is below 2⁻¹¹ of it. What is less probable than
exp(-11) is off by up to 0.01 nats, and hardly counts in a divergence."""


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
        documents: what will be trained on.
        vocabulary: number of logits of the mixture.
        folder: where the file of predictions is made; it has no name and ends with the process.
        progress: told the teachers done, and their number.

    Attributes:
        best: for each document the label of the teacher with the lowest loss on it; of equal ones
            the first.

    Raises:
        BuildError: a teacher has another vocabulary, computes NaN on every document, or there is
            no room for the predictions.
    """

    def __init__(
        self,
        teachers: Mapping[str, Load],
        documents: Sequence[Document],
        vocabulary: int,
        folder: Path | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._places, self._vocabulary = [0], vocabulary
        for document in documents:
            self._places.append(self._places[-1] + len(document) - 1)
        place = Path(folder or tempfile.gettempdir())
        needed, free = self._places[-1] * vocabulary * _BYTES, shutil.disk_usage(place).free
        if needed > free:
            what = (
                f"what the teachers predict takes {needed / 1e9:.1f} GB in {place}, "
                f"which has {free / 1e9:.1f} GB free"
            )
            raise BuildError(Finding(what, "Give less text, or set TMPDIR to a larger disk."))
        self._file = tempfile.TemporaryFile(dir=place)  # noqa: SIM115  it lives as long as this
        losses = [float("inf")] * len(documents)
        best = [""] * len(documents)
        for done, (label, load) in enumerate(teachers.items()):
            progress(done, len(teachers))
            self._ask(label, load(), documents, losses, best)
        progress(len(teachers), len(teachers))
        if "" in best:
            what = f"no teacher computes a finite loss on document {best.index('')}"
            raise BuildError(Finding(what, "Check the dense experts; weights may be damaged."))
        self.best = tuple(best)

    def _ask(
        self,
        label: str,
        model: nn.Module,
        documents: Sequence[Document],
        losses: list[float],
        best: list[str],
    ) -> None:
        """Keep the predictions of `model` on every document that it knows better than others."""
        import torch

        with torch.no_grad():
            for batch in in_order(documents, 1):
                (number,) = batch.numbers
                logits_TV, labels_T = predictions(model, batch)
                if logits_TV.shape[1] != self._vocabulary:
                    what = f"{label} predicts {logits_TV.shape[1]} tokens, the mixture "
                    fix = "Teach with models of the mixture's tokenizer."
                    raise BuildError(Finding(f"{what}{self._vocabulary}", fix))
                told_TV = logits_TV.log_softmax(-1)
                loss = float(-told_TV.gather(1, labels_T[:, None]).mean())
                if loss < losses[number]:
                    losses[number], best[number] = loss, label
                    self._file.seek(self._places[number] * self._vocabulary * _BYTES)
                    self._file.write(told_TV.half().contiguous().numpy().tobytes())

    def __call__(self, batch: Batch) -> Tensor:
        """Return log-probabilities [tokens, vocabulary] for the labelled tokens of `batch`."""
        import torch

        told = []
        for number in batch.numbers:
            first, last = self._places[number : number + 2]
            self._file.seek(first * self._vocabulary * _BYTES)
            raw = bytearray(self._file.read((last - first) * self._vocabulary * _BYTES))
            told.append(torch.frombuffer(raw, dtype=torch.float16).reshape(-1, self._vocabulary))
        labelled = int((batch.labels_BT != IGNORED).sum())
        told_TV = torch.cat(told).float()
        assert len(told_TV) == labelled, "documents are other than those that were taught"
        # Rounding took them a little away from adding up to one.
        return told_TV.log_softmax(-1)

"""Owns how well dense models predict texts, in a measure that compares across tokenizers.

Knows models and their tokenizers; knows nothing of clusters or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeforge.dense import hidden_size, max_positions
from moeforge.errors import Finding, PlanError, RecipeError, SourceError
from moeforge.output.folder import has_tokenizer
from moeforge.planners import Model, Planner
from moeforge.prompting.embed import Progress
from moeforge.recipe import Adapter, Reference
from moeforge.recipe.schema import parse_model
from moeforge.sources import Source, open_source
from moeforge.sources.adapter import open_adapter
from moeforge.weights import Weights

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PHASE = "experts"
_CHARACTERS = 1000
"""Of a text the experts read no more: enough to know whose it is."""


@dataclass(frozen=True)
class Judge:
    """A dense model with its tokenizer, not yet in memory."""

    name: str
    model: Model
    tokenizer: Any
    device: str

    def ids(self, text: str) -> list[int]:
        """Return the token ids of `text`, special tokens included."""
        return list(self.tokenizer(text)["input_ids"])


def judges(names: Sequence[str], *, device: str, offline: bool) -> list[Judge]:
    """Open models by their headers and load their tokenizers.

    Args:
        names: as recipes name them: path or Hub id, @revision, +adapter.
        device: torch device that they will run on.
        offline: use only what is in the local Hub cache.

    Raises:
        RecipeError: one is no name of a model.
        SourceError, HubError, PlanError: one cannot be used, or has no tokenizer.
    """
    from moeforge.gates._tokenize import load_tokenizer

    def open_reference(reference: Reference | Adapter) -> Source:
        if isinstance(reference, Adapter):
            return open_adapter(reference.model, reference.revision, offline=offline)
        place = (reference.model, reference.revision, reference.subfolder)
        return open_source(*place, offline=offline)

    planner = Planner(open_reference)
    models = []
    for name in names:
        try:
            reference = parse_model(name)
        except ValueError as error:
            raise RecipeError(Finding(f"expert {name}: {error}")) from None
        models.append(planner.model(reference, ()))
    if planner.failures:
        found = [finding for error in planner.failures for finding in error.findings]
        raise type(planner.failures[0])(*found, *planner.findings)
    if planner.findings:
        raise PlanError(*planner.findings)
    made = []
    for name, model in zip(names, models, strict=True):
        assert model is not None, "it would have been reported"
        folder = model.donor.folder
        if folder is None or not has_tokenizer(folder):
            what = f"{name} has no tokenizer, so nobody knows what it makes of a text"
            raise SourceError(Finding(what, "Add its tokenizer files."))
        made.append(Judge(name, model, load_tokenizer(folder), device))
    return made


def _readable(text: str, measured: Sequence[Judge]) -> str:
    """Return the beginning of `text` that is within the context of all models."""
    text = text[:_CHARACTERS].encode("utf-8", "replace").decode("utf-8")
    for judge in measured:
        most = max_positions(judge.model.config)
        while most and len(text) > 1 and (count := len(judge.ids(text))) > most:
            text = text[: min(len(text) - 1, len(text) * most // count)]
    return text


def losses_per_byte(
    measured: Sequence[Judge], texts: Sequence[str], progress: Progress
) -> list[NDArray[np.float64]]:
    """Return for each model its cross entropy on each text, in nats per byte of UTF-8.

    All models read the same beginning of a text: up to 1000 characters, and what is within the
    context of them all. Per byte, because what a token is differs between tokenizers. A model whose
    tokenizer puts no token in front is not asked for the first one, as everywhere.

    Args:
        measured: the models; one is in memory at a time, layer by layer.
        texts: texts, none of them empty.
        progress: told the models done.

    Raises:
        SourceError: transformers cannot run one of them.
    """
    import numpy as np

    from moeforge.forward import losses
    from moeforge.workers import workers

    short = [_readable(text, measured) for text in texts]
    nbytes = np.array([len(text.encode("utf-8")) for text in short], dtype=np.float64)
    found = []
    for done, judge in enumerate(measured):
        progress(PHASE, done, len(measured))
        config, weights = judge.model.config, Weights(judge.model)
        ids = [judge.ids(text) for text in short]
        predicted = np.array([len(each) - 1 for each in ids], dtype=np.float64)
        try:
            with workers(hidden_size(config) or 0, judge.device) as share:
                means = losses(config, ids, weights.read, weights.rows, judge.device, share)
        except (ValueError, KeyError) as error:
            what = f"{judge.name} cannot be run: {error}"
            raise SourceError(Finding(what, "Experts are dense causal language models.")) from error
        found.append(np.asarray(means) * predicted / nbytes)
    progress(PHASE, len(measured), len(measured))
    return found

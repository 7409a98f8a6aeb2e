"""Owns comparing any models on any text: loss, perplexity, bits per byte.

Knows tokenizers and models that are loaded; knows nothing of recipes, or of how results look.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeforge import vocabulary
from moeforge.dense import max_positions
from moeforge.errors import BuildError, Finding, MoeforgeError, SourceError
from moeforge.gates._tokenize import load_tokenizer
from moeforge.proof.heldout import WINDOW, cut, read_text, summed, tokenize
from moeforge.proof.loading import Loaded, loaded, reason, refuse_other
from moeforge.sources import Source, open_source

if TYPE_CHECKING:
    from torch import nn

Progress = Callable[[str, int, int], None]
"""Called with a model as it was given, windows done and windows in all."""

_BATCH = 16
"""Most windows in one forward pass."""
_LOGITS = 2**30
"""Bytes that the logits of one forward pass may take; one window is always run."""
_LOOK = 16
"""Tokens by which a model is tried for looking ahead."""
_CHANGE = 0.02
"""Of the largest logit, by how much what was said before a token may change with it."""


@dataclass(frozen=True)
class Score:
    """What a model makes of a text.

    Attributes:
        nats: cross entropy, summed over tokens.
        tokens: tokens that were predicted.
        nbytes: what they spell, in UTF-8.
    """

    nats: float
    tokens: int
    nbytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite where a float cannot hold it."""
        return _exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text: compares models whose tokens differ."""
        return self.nats / math.log(2) / self.nbytes


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 709 else math.inf


@dataclass(frozen=True)
class Measured:
    """One model, measured.

    Attributes:
        model: as it was given.
        dtype: of its arithmetic.
        streamed: it was read from disk layer by layer.
        scores: one for each text.
    """

    model: str
    dtype: str
    streamed: bool
    scores: tuple[Score, ...]

    @property
    def loss(self) -> float:
        """Nats per token, the mean over texts, each of which counts the same."""
        return sum(score.loss for score in self.scores) / len(self.scores)

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss."""
        return _exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte, the mean over texts, each of which counts the same."""
        return sum(score.bits_per_byte for score in self.scores) / len(self.scores)


@dataclass(frozen=True)
class Comparison:
    """Models side by side.

    Attributes:
        texts: files.
        models: one entry for each model, in the order given.
        same_tokens: all tokenizers cut all texts into the same tokens. Where they do not, losses
            per token and perplexities are of different things, and only bits per byte compare.
        window: tokens per window.
        notes: what is worth knowing.
    """

    texts: tuple[Path, ...]
    models: tuple[Measured, ...]
    same_tokens: bool
    window: int
    notes: tuple[Finding, ...]


@dataclass(frozen=True)
class _Rows:
    """A text as a model gets it: its windows, and how many bytes the predicted tokens spell."""

    windows: list[list[int]]
    nbytes: int

    @property
    def predicted(self) -> int:
        return sum(len(window) - 1 for window in self.windows)


@dataclass(frozen=True)
class _Entry:
    """A model before it is loaded.

    Attributes:
        source: the checkpoint.
        rows: each text for it.
        tokens: the tokens of each text as the tokenizer calls them, and how many are predicted.
        unknown: share of tokens that stand for text the tokenizer has no token for.
    """

    source: Source
    rows: list[_Rows]
    tokens: list[tuple[int, list[str]]]
    unknown: float


def compare(
    models: Sequence[str],
    texts: Sequence[Path],
    *,
    dtype: str = "auto",
    device: str = "cpu",
    memory: int | None = None,
    window: int = WINDOW,
    trust_remote_code: bool = False,
    offline: bool = False,
    progress: Progress = lambda model, done, total: None,
) -> Comparison:
    """Measure every model on every text, one model in memory at a time.

    Texts are cut into windows as `heldout.cut` says, and predicted to the last token.

    Args:
        models: folders or Hub ids.
        texts: files in UTF-8.
        dtype: "auto" for the stored one, or "float32"; see `loading.DTYPES`.
        device: torch device.
        memory: most bytes that weights may take; models that are larger are read from disk layer
            by layer in every pass. None for four fifths of what is free.
        window: tokens per window, BOS included.
        trust_remote_code: run code that comes with models and is not moeforge's own.
        offline: use only what is in the local Hub cache.
        progress: told what is done.

    Raises:
        MoeforgeError: before any model is loaded, with everything that is wrong with texts and
            models; its kind is that of the first thing. While one is loaded or run: BuildError.
    """
    findings: list[MoeforgeError] = []
    contents = [_try(read_text, findings, path) for path in texts]
    entries = [
        _try(_prepare, findings, model, texts, contents, window, trust_remote_code, offline)
        for model in models
    ]
    if findings:
        raise type(findings[0])(*dict.fromkeys(f for error in findings for f in error.findings))
    notes: list[Finding] = []
    measured = []
    for model, entry in zip(models, entries, strict=True):
        assert entry is not None
        with loaded(entry.source, dtype, device, memory, trust_remote_code) as ready:
            notes += _notes(model, entry, ready)
            scores = _scores(model, entry, ready, texts, progress)
            measured.append(Measured(model, ready.dtype, ready.streamed, scores))
        del ready
        gc.collect()  # modules refer to each other in circles
    dtypes = {each.model: each.dtype for each in measured}
    if len(set(dtypes.values())) > 1:
        what = "models were run in different dtypes: " + ", ".join(map(" in ".join, dtypes.items()))
        notes.append(Finding(what, "Give --dtype float32 to compare them in one."))
    same = all(entry.tokens == entries[0].tokens for entry in entries if entry and entries[0])
    return Comparison(tuple(texts), tuple(measured), same, window, tuple(notes))


def _try(make: Callable[..., Any], findings: list[MoeforgeError], *arguments: Any) -> Any:
    try:
        return make(*arguments)
    except MoeforgeError as error:
        findings.append(error)
        return None


def _prepare(
    model: str,
    texts: Sequence[Path],
    contents: Sequence[str | None],
    window: int,
    trust_remote_code: bool,
    offline: bool,
) -> _Entry:
    """Return a model with its windows of every text that could be read; no weight is loaded.

    Raises:
        MoeforgeError: the model cannot be opened, is no causal language model, lacks a tokenizer,
            or takes shorter windows; or a text is too short for it.
    """
    source = open_source(model, offline=offline)
    refuse_other(source, trust_remote_code=trust_remote_code)
    if source.folder is None or not vocabulary.present(source.folder):
        raise SourceError(Finding(f"{model} has no tokenizer", "Add its tokenizer files."))
    most = max_positions(source.config)
    if most is not None and most < window:
        what = f"{model} takes at most {most} tokens, and windows have {window}"
        raise SourceError(Finding(what, f"Give --window {most}."))
    tokenizer = load_tokenizer(source.folder)
    rows, tokens, unknown, total = [], [], 0, 0
    for path, text in zip(texts, contents, strict=True):
        if text is None:
            continue
        ids = tokenize(tokenizer, text)
        _check_ids(model, ids, source.config)
        rows.append(_rows(tokenizer, path, text, ids, window))
        tokens.append((rows[-1].predicted, tokenizer.convert_ids_to_tokens(ids)))
        unknown += ids.count(tokenizer.unk_token_id)
        total += len(ids)
    return _Entry(source, rows, tokens, unknown / max(total, 1))


def _check_ids(model: str, ids: Sequence[int], config: dict[str, Any]) -> None:
    """Refuse a tokenizer that makes ids without embeddings."""
    size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    if isinstance(size, int) and ids and max(ids) >= size:
        what = f"{model}: its tokenizer makes token {max(ids)}, and it has {size} embedding rows"
        raise SourceError(Finding(what, "Give it the tokenizer that it was trained with."))


def _rows(tokenizer: Any, path: Path, text: str, ids: Sequence[int], window: int) -> _Rows:
    """Return windows of a text, and the bytes that are predicted in them.

    All of its bytes; where there is no BOS, all but those of its first token, to the character.
    """
    bos = tokenizer.bos_token_id
    windows = cut(ids, bos, window)
    if not windows:
        what = f"{path} is too short: it has {len(ids)} tokens, of which none can be predicted"
        raise BuildError(Finding(what, "Give more text."))
    if bos is not None:
        return _Rows(windows, len(text.encode()))
    if tokenizer.is_fast:
        _, end = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ][0]
        first = text[:end]
    else:
        first = tokenizer.decode(ids[:1])
    return _Rows(windows, len(text.encode()) - len(first.encode()))


def _notes(model: str, entry: _Entry, ready: Loaded) -> list[Finding]:
    notes = []
    if entry.unknown:
        what = f"{model}: its tokenizer has no tokens for some of the text ({entry.unknown:.2%})"
        fix = "What is unknown is predicted cheaply: its bits per byte are too low."
        notes.append(Finding(what, fix, warning=True))
    if ready.unused:
        what = f"{model}: transformers has no place for {len(ready.unused)} of its tensors, "
        notes.append(Finding(f"{what}first {ready.unused[0]}", warning=True))
    return notes


def _scores(
    model: str, entry: _Entry, ready: Loaded, texts: Sequence[Path], progress: Progress
) -> tuple[Score, ...]:
    """Run a model on its windows of every text.

    Raises:
        BuildError: it cannot be run, computes NaN or infinity, or looks ahead.
    """
    import torch

    size = _batch(ready.model, max(len(row) for rows in entry.rows for row in rows.windows))
    total, done = sum(len(rows.windows) for rows in entry.rows), 0
    progress(model, 0, total)
    scores = []
    try:
        _refuse_looking_ahead(model, ready, entry.rows[0].windows[0])
        for path, rows in zip(texts, entry.rows, strict=True):
            nats = 0.0
            for batch in _batches(rows.windows, size):
                nats += summed(ready.model, torch.tensor(batch, device=ready.device))
                done += len(batch)
                progress(model, done, total)
            if not math.isfinite(nats):
                what = f"{model} computes NaN or infinity on {path} in {ready.dtype}"
                fix = "Try --dtype float32." if ready.dtype != "float32" else ""
                raise BuildError(Finding(what, fix))
            scores.append(Score(nats, rows.predicted, rows.nbytes))
    except MoeforgeError:
        raise
    except Exception as error:  # whatever the code of a model raises; CUDA's out of memory too
        raise BuildError(Finding(f"{model} cannot be run: {reason(error)}")) from error
    return tuple(scores)


def _batch(model: nn.Module, window: int) -> int:
    """Return how many windows to run at once, so that their logits stay small."""
    config: Any = model.config
    dtype: Any = model.dtype
    row: int = window * config.get_text_config().vocab_size * dtype.itemsize
    return max(1, min(_BATCH, _LOGITS // row))


def _batches(windows: list[list[int]], size: int) -> list[list[list[int]]]:
    """Return windows in batches; a shorter last window is one of its own, so nothing is padded."""
    whole = [row for row in windows if len(row) == len(windows[0])]
    batches = [whole[start : start + size] for start in range(0, len(whole), size)]
    return batches if len(whole) == len(windows) else [*batches, windows[-1:]]


def _refuse_looking_ahead(model: str, ready: Loaded, window: list[int]) -> None:
    """Refuse a model in which a token changes what was said before it: its loss means nothing.

    BERTs pass for language models in transformers. Whether attention is causal is in no config
    that could be trusted, so it is tried.
    """
    import torch

    ids = window[:_LOOK]
    other = [*ids[:-1], int(ids[-1] == 0)]
    with torch.no_grad():
        both = torch.tensor([ids, other], device=ready.device)
        logits = ready.model(input_ids=both, use_cache=False).logits[:, -len(ids) : -1].float()
    # Rounding may change a little, and in a mixture now and then an expert: hence the median.
    change = (logits[0] - logits[1]).abs().amax(-1).median()
    if bool(change > _CHANGE * logits.abs().max()):
        what = f"{model} is not a causal language model: it sees the tokens that it is to predict"
        raise BuildError(Finding(what, "Give models that predict the next token."))

"""Owns turning texts into unit vectors with sentence-transformers. Knows nothing of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeforge import sources
from moeforge.errors import Finding, SourceError
from moeforge.forward import quiet

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vectors = NDArray[np.float64]
    """[texts, dimensions]; every row has length one."""

Embed = Callable[[Sequence[str]], "Vectors"]
Progress = Callable[[str, int, int], None]
"""Called with the phase, what is done of it, and all of it."""

PHASE = "embeddings"
_CHARACTERS = 20_000
"""Of a text no more is handed on: embedding models read its first few hundred tokens, but would
tokenize all of a line that is a gigabyte long."""
_CHUNK = 256
"""Texts between two calls of `progress`."""
_BATCH = 32


def unit(rows: Vectors) -> Vectors:
    """Return `rows` divided by their lengths; rows of zeros stay."""
    import numpy as np

    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 0, lengths, 1.0))


def embedder(
    name: str,
    *,
    beside: Path = Path(),
    device: str = "cpu",
    offline: bool = False,
    progress: Progress = lambda phase, done, total: None,
) -> Embed:
    """Return what embeds texts with the model `name`.

    Args:
        name: a folder, looked up in `beside` and then in the working directory, or a Hub id. A
            sentence-transformers model does its own pooling; of another encoder the library
            averages the token vectors. Code that lies beside the weights is not run.
        beside: folder of the recipe.
        device: torch device.
        offline: use only what is in the local Hub cache.
        progress: told the texts done.

    Raises:
        SourceError: there is no such model, or it cannot be used.
        HubError: the Hub refused or could not be reached.
    """

    def local(folder: Path) -> Any:
        try:
            return _load(str(folder), device, offline=True)
        except Exception as error:  # the library raises many kinds for a folder that is no model
            what = f"embedding_model {name} cannot be loaded: {_reason(error)}"
            fix = "Give the folder of a sentence-transformers model, or a Hub id."
            raise SourceError(Finding(what, fix)) from error

    def remote() -> Any:
        from moeforge.sources.hub_errors import explain

        try:
            return _load(name, device, offline=offline)
        except Exception as error:
            raise explain(error, f"embedding_model {name} cannot be loaded") from error

    model = sources.find(name, None, beside, local, remote, "embedding_model ")

    def embed(texts: Sequence[str]) -> Vectors:
        return _embed(model, name, texts, progress)

    return embed


def _load(name: str, device: str, *, offline: bool) -> Any:
    from sentence_transformers import SentenceTransformer

    with quiet():
        return SentenceTransformer(
            name, device=device, local_files_only=offline, trust_remote_code=False
        )


def _embed(model: Any, name: str, texts: Sequence[str], progress: Progress) -> Vectors:
    import numpy as np

    # Lone surrogates, which JSON can write, no tokenizer takes.
    short = [t[:_CHARACTERS].encode("utf-8", "replace").decode("utf-8") for t in texts]
    made: list[Any] = []
    for start in range(0, len(short), _CHUNK):
        progress(PHASE, start, len(short))
        chunk = short[start : start + _CHUNK]
        try:
            made.append(model.encode(chunk, batch_size=_BATCH, show_progress_bar=False))
        except Exception as error:
            what = f"embedding_model {name} cannot embed texts: {_reason(error)}"
            raise SourceError(Finding(what, "Give another embedding model.")) from error
    progress(PHASE, len(short), len(short))
    if not made:
        return np.zeros((0, 1))
    rows = np.concatenate(made).astype(np.float64)
    if not np.isfinite(rows).all():
        what = f"embedding_model {name} gives NaN or infinity; its weights may be damaged"
        raise SourceError(Finding(what, "Give another embedding model."))
    return unit(rows)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__

"""Owns dividing one unlabelled corpus among experts: clusters, and who answers for which.

Clusters are those of k-means on unit vectors, where the squared distance of two texts is
2 − 2·cosine (scikit-learn's k-means++ and Lloyd iterations, ten starts). Which expert gets which
follows from what each is good at: the assignment with the least sum of losses (Kuhn's Hungarian
method), one cluster each.
An expert that is better or worse than another everywhere is not preferred for it: a constant added
to its losses changes no assignment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moeforge.errors import Finding, RecipeError
from moeforge.prompting import piles
from moeforge.prompting.embed import Progress, embedder
from moeforge.prompting.judges import Judge, judges, losses_per_byte
from moeforge.recipe import Prompt
from moeforge.recipe.selecting import EMBEDDING_MODEL

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moeforge.prompting.embed import Vectors

JUDGED = 32
"""Texts of a cluster, evenly spaced, that the experts are measured on."""
_STARTS = 10


@dataclass(frozen=True)
class Cluster:
    """Texts that are alike.

    Attributes:
        expert: place of the expert that it was given to.
        prompts: its texts, in the order of the corpus.
        losses: for each expert, the mean loss on up to 32 of them, nats per byte.
        central: the text that is nearest to the middle.
    """

    expert: int
    prompts: tuple[Prompt, ...]
    losses: tuple[float, ...]
    central: Prompt


@dataclass(frozen=True)
class Clustering:
    """A corpus divided among experts.

    Attributes:
        experts: the models, as they were given.
        labels: names of their prompts files, without ending.
        clusters: one for each expert, in the same order.
        left_out: repeated and blank texts of the corpus.
    """

    experts: tuple[str, ...]
    labels: tuple[str, ...]
    clusters: tuple[Cluster, ...]
    left_out: int

    def findings(self) -> tuple[Finding, ...]:
        """Return a warning for each cluster that another expert than its own predicts better."""
        found = []
        for name, cluster in zip(self.experts, self.clusters, strict=True):
            best = min(range(len(self.experts)), key=lambda e: cluster.losses[e])
            own = cluster.losses[cluster.expert]
            if cluster.losses[best] < own:
                what = (
                    f"{name} got {len(cluster.prompts)} texts that {self.experts[best]} predicts "
                    f"better: {cluster.losses[best]:.3f} nats per byte against {own:.3f}"
                )
                fix = "Each expert gets one cluster. Read its texts before building with them."
                found.append(Finding(what, fix, warning=True))
        return tuple(found)


def k_means(rows: Vectors, count: int, seed: int) -> NDArray[np.int64]:
    """Return the cluster of each unit vector, numbered in the order in which they first occur."""
    import numpy as np
    from sklearn.cluster import KMeans  # type: ignore[import-untyped]
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(1):  # several would add up in another order each time
        means = KMeans(count, n_init=_STARTS, random_state=seed % 2**32, algorithm="lloyd")
        raw = means.fit_predict(rows)
    _, first = np.unique(raw, return_index=True)
    order = np.empty(len(first), dtype=np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    return np.asarray(order[raw])


def assign(losses_CE: Sequence[Sequence[float]]) -> list[int]:
    """Return for each expert the cluster that it gets, with the least sum of losses.

    Args:
        losses_CE: [clusters][experts], as many of the one as of the other.
    """
    import numpy as np
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    experts, clusters = linear_sum_assignment(np.asarray(losses_CE).T)
    return [int(cluster) for _, cluster in sorted(zip(experts, clusters, strict=True))]


def _spaced(numbers: Sequence[int]) -> list[int]:
    most = min(len(numbers), JUDGED)
    return [numbers[n * len(numbers) // most] for n in range(most)]


def _divide(
    rows: Vectors, texts: Sequence[str], measured: Sequence[Judge], seed: int, progress: Progress
) -> tuple[list[list[int]], list[list[float]], list[int]]:
    """Return the texts of each cluster, losses_CE, and the cluster of each expert."""
    import numpy as np

    cluster_of = k_means(rows, len(measured), seed)
    members = [np.flatnonzero(cluster_of == c).tolist() for c in range(len(measured))]
    judged = [_spaced(numbers) for numbers in members]
    flat = [texts[number] for numbers in judged for number in numbers]
    ends = np.cumsum([len(numbers) for numbers in judged]).tolist()
    by_expert = losses_per_byte(measured, flat, progress)
    means = [[float(part.mean()) for part in np.split(each, ends[:-1])] for each in by_expert]
    losses_CE = [list(column) for column in zip(*means, strict=True)]
    return members, losses_CE, assign(losses_CE)


def cluster_corpus(
    corpus: Path,
    experts: Sequence[str],
    out: Path,
    *,
    embedding_model: str = EMBEDDING_MODEL,
    seed: int = 0,
    device: str = "cpu",
    offline: bool = False,
    progress: Progress = lambda phase, done, total: None,
) -> Clustering:
    """Divide one unlabelled corpus among experts, and write `out`/EXPERT.jsonl for each.

    Args:
        corpus: a prompts file; its texts are what is divided.
        experts: two or more dense models, as recipes name them: path or Hub id, @revision,
            +adapter. Their tokenizers may differ.
        out: folder to make.
        embedding_model: folder or Hub id, see `embed.embedder`.
        seed: what the starts of k-means follow from.
        device: torch device of the embedding model and of the experts.
        offline: use only what is in the local Hub cache.
        progress: told the texts embedded, and the experts done.

    Raises:
        RecipeError: the corpus cannot be read or has fewer texts than there are experts, an expert
            is no model's name, or there is only one.
        SourceError, HubError: a model cannot be used.
        BuildError: `out` exists.
    """
    piles.refuse_existing(out)
    prompts = piles.read(corpus)
    texts = [piles.text_of(prompt) for prompt in prompts]
    numbers = piles.distinct(texts)
    if len(experts) < 2:
        raise RecipeError(Finding("one expert gets everything", "Give two or more with --experts."))
    if len(numbers) < len(experts):
        what = f"{corpus} has {len(numbers)} different texts for {len(experts)} experts"
        fix = "Give more text; in a .txt file a blank line stands between texts."
        raise RecipeError(Finding(what, fix))
    measured = judges(experts, device=device, offline=offline)
    embed = embedder(embedding_model, device=device, offline=offline, progress=progress)
    usable = [texts[number] for number in numbers]
    rows = embed(usable)
    members, losses_CE, given = _divide(rows, usable, measured, seed, progress)
    clusters = []
    for expert, cluster in enumerate(given):
        own = rows[members[cluster]]
        middle = members[cluster][int((own @ own.mean(axis=0)).round(6).argmax())]
        clusters.append(
            Cluster(
                expert,
                tuple(prompts[numbers[member]] for member in members[cluster]),
                tuple(losses_CE[cluster]),
                prompts[numbers[middle]],
            )
        )
    labels = tuple(piles.labels(experts))
    piles.write(out, {label: c.prompts for label, c in zip(labels, clusters, strict=True)})
    return Clustering(tuple(experts), labels, tuple(clusters), len(prompts) - len(numbers))

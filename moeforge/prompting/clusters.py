"""Owns dividing one unlabelled corpus among experts: clusters, and who answers for which.

Clusters are those of k-means on unit vectors, where the squared distance of two texts is
2 − 2·cosine (scikit-learn's k-means++ and Lloyd iterations); each start ends in its own. Experts
get one cluster each, in the assignment with the least sum of losses (Kuhn's Hungarian method), and
the start is taken whose texts are predicted best by the experts that get them: what an embedding
model finds most alike need not be what the experts are good at. An expert that is better or worse
than another everywhere gets no other cluster for it: a constant added to its losses changes no
assignment.

On the quickstart's 256 prompts, three seeds, 89-90 % come to the expert that they are labelled
with, and `fitted` on these files has a mean held-out loss of 2.417 to 2.420 (labelled: 2.415). The
start with the least squared distances, of 10 or of 100, gave 58-80 %, in three of six cases with
French and German in one cluster, and for the first seed losses of 2.431 and 2.541: all-MiniLM-L6-v2
goes by subject more than by language. That way was tried first; the texts are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moeforge.errors import Finding, RecipeError
from moeforge.prompting import piles
from moeforge.prompting.embed import Progress, embedder
from moeforge.prompting.judges import judges, losses_per_byte
from moeforge.recipe import Prompt
from moeforge.recipe.selecting import EMBEDDING_MODEL

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moeforge.prompting.embed import Vectors

JUDGED = 32
"""Texts that the experts are measured on, for each expert there is: drawn from the whole corpus."""
_STARTS = 100
"""Starts of k-means; 0.2 s for the quickstart's 256 prompts."""


@dataclass(frozen=True)
class Cluster:
    """Texts that are alike.

    Attributes:
        expert: place of the expert that it was given to.
        prompts: its texts, in the order of the corpus.
        losses: for each expert, the mean loss on those that were measured, nats per byte.
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
    """Return the cluster of each unit vector, numbered in the order in which they first occur.

    One start, which follows from `seed`.
    """
    import numpy as np
    from sklearn.cluster import KMeans  # type: ignore[import-untyped]
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(1):  # several would add up in another order each time
        means = KMeans(count, n_init=1, random_state=seed % 2**32, algorithm="lloyd")
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


def divide(
    rows: Vectors, judged: Sequence[int], losses_EJ: Vectors, seed: int
) -> tuple[NDArray[np.int64], Vectors, list[int]]:
    """Return the cluster of each text, losses_CE, and the cluster of each expert.

    Args:
        rows: unit vectors of the texts.
        judged: numbers of the texts that the experts were measured on.
        losses_EJ: what each expert lost on each of these.
        seed: the starts follow from it.

    Raises:
        RecipeError: every start ends with a cluster of which no text was measured.
    """
    import numpy as np

    found: list[tuple[float, NDArray[np.int64], Vectors, list[int]]] = []
    for start in range(_STARTS):
        cluster_of = k_means(rows, len(losses_EJ), seed + start)
        measured = cluster_of[list(judged)]
        counts = np.bincount(measured, minlength=len(losses_EJ))
        if not counts.all():
            continue
        member_CJ = np.arange(len(losses_EJ))[:, None] == measured
        losses_CE = member_CJ @ losses_EJ.T / counts[:, None]
        given = assign(losses_CE.tolist())
        total = sum(losses_CE[c, e] * counts[c] for e, c in enumerate(given)) / len(judged)
        found.append((round(float(total), 9), cluster_of, losses_CE, given))
    if not found:
        what = "the texts fall into one large heap and clusters too small to measure experts on"
        raise RecipeError(Finding(what, "Give a corpus in which every expert has its share."))
    return min(found, key=lambda each: each[0])[1:]


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
        seed: what the starts of k-means, and the texts that experts are measured on, follow from.
        device: torch device of the embedding model and of the experts.
        offline: use only what is in the local Hub cache.
        progress: told the texts embedded, and the experts done.

    Raises:
        RecipeError: the corpus cannot be read or has fewer texts than there are experts, an expert
            is no model's name, or there is only one.
        SourceError, HubError: a model cannot be used.
        BuildError: `out` exists.
    """
    import numpy as np

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
    most = min(len(usable), JUDGED * len(experts))
    # Drawn, not evenly spaced: a corpus that goes through its domains in turn must not be aliased.
    judged = np.sort(np.random.default_rng(seed).permutation(len(usable))[:most]).tolist()
    losses_EJ = np.stack(losses_per_byte(measured, [usable[j] for j in judged], progress))
    cluster_of, losses_CE, given = divide(rows, judged, losses_EJ, seed)
    clusters = []
    for expert, cluster in enumerate(given):
        members = np.flatnonzero(cluster_of == cluster).tolist()
        own = rows[members]
        middle = members[int((own @ own.mean(axis=0)).round(6).argmax())]
        clusters.append(
            Cluster(
                expert,
                tuple(prompts[numbers[member]] for member in members),
                tuple(losses_CE[cluster].tolist()),
                prompts[numbers[middle]],
            )
        )
    labels = tuple(piles.labels(experts))
    piles.write(out, {label: c.prompts for label, c in zip(labels, clusters, strict=True)})
    return Clustering(tuple(experts), labels, tuple(clusters), len(prompts) - len(numbers))

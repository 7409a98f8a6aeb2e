"""The room that compares prompts by their embeddings: selects, clusters, says what overlaps.

Knows texts and vectors; knows nothing of gates. Only `clusters` runs language models.
"""

from moeforge.prompting.clusters import Clustering, cluster_corpus
from moeforge.prompting.overlap import Overlap
from moeforge.prompting.recipes import overlap_of, with_selection
from moeforge.prompting.selection import Kept, select_files

__all__ = [
    "Clustering",
    "Kept",
    "Overlap",
    "cluster_corpus",
    "overlap_of",
    "select_files",
    "with_selection",
]

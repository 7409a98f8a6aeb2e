"""della_linear: the base plus differences from it, thinned by rank, rescaled."""

from __future__ import annotations

from moeforge.methods import Param
from moeforge.methods._rank import check, thin_by_rank, thinned
from moeforge.methods._task import task_method

METHOD = task_method(
    "Linear DELLA",
    "https://arxiv.org/abs/2406.11617",
    sparsify=thin_by_rank,
    thinned=thinned,
    rescale=True,
    rows=True,
    more={"epsilon": Param(float, 0.15, "non_base")},
    check=check,
)

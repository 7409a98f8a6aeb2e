"""dare_ties: randomly thinned differences from the base, those of the elected sign, rescaled."""

from __future__ import annotations

from moeforge.methods._random import chances, drop
from moeforge.methods._task import task_method

METHOD = task_method(
    "DARE TIES",
    "https://arxiv.org/abs/2311.03099",
    sparsify=drop,
    chances=chances,
    consensus=True,
    rescale=True,
)

"""dare_linear: the base plus randomly thinned differences from it, rescaled."""

from __future__ import annotations

from moeforge.methods._random import chances, drop
from moeforge.methods._task import task_method

METHOD = task_method(
    "Linear DARE",
    "https://arxiv.org/abs/2311.03099",
    sparsify=drop,
    chances=chances,
    rescale=True,
)

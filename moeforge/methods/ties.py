"""ties: the largest differences of each model, those of the elected sign, averaged."""

from __future__ import annotations

from moeforge.methods._magnitude import find_largest, small, trim
from moeforge.methods._task import task_method

METHOD = task_method(
    "TIES",
    "https://arxiv.org/abs/2306.01708",
    sparsify=trim,
    find=find_largest,
    bounds=small,
    consensus=True,
    normalize=True,
)

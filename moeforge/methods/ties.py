"""ties: the largest differences of each model, those of the elected sign, averaged."""

from __future__ import annotations

from moeforge.methods._magnitude import find_largest, trim
from moeforge.methods._task import task_method

METHOD = task_method(
    "TIES",
    "https://arxiv.org/abs/2306.01708",
    sparsify=trim,
    find=find_largest,
    consensus=True,
    normalize=True,
)

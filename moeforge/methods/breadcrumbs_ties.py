"""breadcrumbs_ties: differences without the largest and smallest, those of the elected sign."""

from __future__ import annotations

from moeforge.methods import Param
from moeforge.methods._magnitude import drop_outliers, find_window, window
from moeforge.methods._task import task_method

METHOD = task_method(
    "Model Breadcrumbs with TIES",
    "https://arxiv.org/abs/2312.06795",
    sparsify=drop_outliers,
    find=find_window,
    bounds=window,
    consensus=True,
    more={"gamma": Param(float, 0.01, "non_base")},
)

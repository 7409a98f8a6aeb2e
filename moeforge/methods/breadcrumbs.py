"""breadcrumbs: the base plus differences from it that are neither the largest nor the smallest."""

from __future__ import annotations

from moeforge.methods import Param
from moeforge.methods._magnitude import drop_outliers, find_window, window
from moeforge.methods._task import task_method

METHOD = task_method(
    "Model Breadcrumbs",
    "https://arxiv.org/abs/2312.06795",
    sparsify=drop_outliers,
    find=find_window,
    bounds=window,
    more={"gamma": Param(float, 0.01, "non_base")},
)

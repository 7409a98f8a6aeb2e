"""task_arithmetic: the base plus the weighted sum of differences from it."""

from __future__ import annotations

from moeforge.methods._task import task_method

METHOD = task_method("Task Arithmetic", "https://arxiv.org/abs/2212.04089")

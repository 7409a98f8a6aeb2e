"""Owns adding up sums that are taken side by side, each of the elements of one remainder."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeforge.kernels.rows import STRETCH, compiled


@compiled
def fold(lanes: Any, sums: Any) -> None:
    """Put the sums of the rows of `lanes` into `sums`, halves added to halves, and zeros into them.

    Args:
        lanes: float32 [rows, STRETCH or more], of which STRETCH are added up.
        sums: float64 [rows].
    """
    room = np.empty(STRETCH)
    for i in range(lanes.shape[0]):
        for j in range(STRETCH):
            room[j] = np.float64(lanes[i, j])
            lanes[i, j] = np.float32(0.0)
        size = STRETCH // 2
        while size > 0:
            for j in range(size):
                room[j] += room[size + j]
            size //= 2
        sums[i] = room[0]

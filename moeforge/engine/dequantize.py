"""Owns undoing float8 quantisation: codes times the scales of their blocks, row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moeforge.sources.quantized import block_length, scale_shape

if TYPE_CHECKING:
    from torch import Tensor


def dequantized_rows(codes: Tensor, first: int, rows: int, scale: Tensor) -> Tensor:
    """Return rows [first, first + n) of a matrix that is stored as codes and scales.

    Source of the formula: DeepSeek-V3 technical report, arXiv 2412.19437, section 3.3.2:
    weight[i, j] = code[i, j] · scale[i // 128, j // 128]; scales of whole rows and of the whole
    matrix are blocks of that size.

    Args:
        codes: these rows of the codes as numbers, float32 [n, columns].
        first: number of the first of them.
        rows: number of rows of the whole matrix.
        scale: all scales of the matrix, [block rows, block columns], [rows] or one element.

    Returns:
        float32 [n, columns].
    """
    n, columns = codes.shape
    across, along = scale_shape(tuple(scale.shape))
    height, width = block_length(rows, across), block_length(columns, along)
    assert height, "the planner refuses scales that do not fit"
    assert width, "the planner refuses scales that do not fit"
    block_row = torch.arange(first, first + n, device=codes.device) // height
    scale_nC = scale.to(codes.dtype).reshape(across, along)[block_row]
    return codes * scale_nC.repeat_interleave(width, dim=1)[:, :columns]

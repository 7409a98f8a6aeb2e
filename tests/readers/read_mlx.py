"""Logits of a folder in MLX, loaded strictly: a tensor too many or too few is an error."""

import mlx.core as mx
import numpy as np
from mlx_lm import load
from serve import serve


def logits(folder, ids):
    model, _ = load(str(folder))
    return np.array(model(mx.array(ids)).astype(mx.float32))


serve(logits)

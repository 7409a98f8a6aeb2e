"""Owns compiled arithmetic: the merges that people use most, each in one pass through the cache.

What is compiled gives the bits that the torch code beside it gives: the same operations on the same
numbers in the same order, each rounded once, no product and sum contracted into one rounding. So it
is a matter of speed alone, and where numba is missing, or an input is of another kind, torch does
the work. Compiling takes some seconds once, the result is kept: see `keeping`. For merges that are
done sooner numba is not imported.
"""

from __future__ import annotations

import gc
import importlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moeforge.kernels import keeping

if TYPE_CHECKING:
    from torch import Tensor

_SIX = ("angles", "differences", "drawing", "products", "thinning", "varying")
WORTH = {"sums": 2**30, **dict.fromkeys(_SIX, 2**28)}
"""For each file here, elements of all inputs that each worker has to read for a build to gain more
than numba takes to load."""

_LONG = 1.0
"""Seconds that loading does not take where everything is compiled."""
_loaded = False


def load(
    names: Iterable[str],
    *,
    narrow: bool,
    compiling: Callable[[int, int], None] = lambda done, total: None,
) -> bool:
    """Have the methods use compiled arithmetic from now on, also in processes forked later.

    Args:
        names: files of this folder that will be used.
        narrow: matrices will be of bfloat16, not of float32.
        compiling: told (0, 1) by another thread where it takes long, for then it is done for the
            first time; and (1, 1) after that.

    Returns:
        Whether they do: False where numba is not installed or cannot be used.
    """
    global _loaded
    timer, began = threading.Timer(_LONG, compiling, (0, 1)), time.monotonic()
    timer.start()
    try:
        import numpy as np

        kind = np.uint16 if narrow else np.float32
        with _quickly():
            for name in sorted(set(names)):
                kernel = importlib.import_module(f"{__name__}.{name}")
                with keeping.alone(name, kind.__name__):
                    kernel.warm(kind)
    except Exception:  # numba refuses by many errors: its own, numpy's version, no folder
        return False
    finally:
        timer.cancel()
        timer.join()  # processes are forked after this
        if time.monotonic() - began > _LONG:
            compiling(1, 1)
    _loaded = True
    return True


@contextmanager
def _quickly() -> Iterator[None]:
    """Import numba without looking through all that torch left in memory again and again."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def unload() -> None:
    """Have the methods use torch alone."""
    global _loaded
    _loaded = False


def loaded() -> bool:
    """Say whether the methods use compiled arithmetic."""
    return _loaded


def matrix(tensors: Tensor) -> Any:
    """Return `tensors` [inputs, elements] as compiled functions take them, or None.

    bfloat16 as uint16, float32 as float32, sharing memory. None where nothing compiled is loaded,
    for other dtypes, and on other devices than the CPU.
    """
    import torch

    if not _loaded or tensors.device.type != "cpu" or not tensors.is_contiguous():
        return None
    if tensors.dtype == torch.bfloat16:
        return tensors.view(torch.uint16).numpy()
    return tensors.numpy() if tensors.dtype == torch.float32 else None

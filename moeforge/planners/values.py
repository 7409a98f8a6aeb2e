"""Owns looking at a few stored values while planning, where headers cannot tell what is exact.

Only tensors that a mixture is full of in vain are looked at, such as a shared expert of zeros.
"""

from __future__ import annotations

from moeforge.planners.model import Model
from moeforge.plans import PlannedTensor, Read
from moeforge.sources import streamed

_WINDOW = 2**20


class Unread(Exception):
    """Values that are needed and not here."""


def all_equal(model: Model, tensor: PlannedTensor, element: bytes) -> bool:
    """Say whether all elements of a stored tensor are `element`, byte for byte.

    Args:
        model: whose tensor.
        tensor: as it is stored; of what is computed nothing is known.
        element: the bytes of one element.

    Raises:
        Unread: its file has not been downloaded.
    """
    expr = tensor.expr
    if not isinstance(expr, Read) or len(element) != tensor.spec.dtype.itemsize:
        return False
    source = model.sources[expr.source]
    coming = streamed(source)
    if coming and not coming.has(coming.file_of(expr.name)):
        raise Unread(f"whether {expr.name} does anything must be looked at, and it is not here")
    for start in range(0, tensor.spec.nbytes, _WINDOW):
        data = bytearray(min(_WINDOW, tensor.spec.nbytes - start))
        source.read(expr.name, start, memoryview(data))
        if data != element * (len(data) // len(element)):
            return False
    return True

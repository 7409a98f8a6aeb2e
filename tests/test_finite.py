"""Values that are not finite are found in raw bytes, of every dtype, as torch finds them."""

import pytest
import torch

from moeforge import finite
from moeforge.finite import count_odd
from moeforge.tensors import BY_NAME

FLOATS = [name for name in BY_NAME if name.startswith(("float", "bfloat"))]


@pytest.mark.parametrize("name", FLOATS)
def test_counts_are_torchs(name, monkeypatch):
    monkeypatch.setattr(finite, "_AT_A_TIME", 1000)  # the last part is a short one
    dtype = getattr(torch, name)
    size = dtype.itemsize
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (3000 * size,), generator=generator, dtype=torch.uint8)
    if size < 4:  # every code there is
        codes = torch.arange(256**size).to({1: torch.uint8, 2: torch.uint16}[size])
        raw = torch.cat([raw, codes.view(torch.uint8)])
    else:
        odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0], dtype=dtype)
        raw = torch.cat([raw, odd.view(torch.uint8)])
    values = raw.view(dtype).to(torch.float64)
    expected = (int(values.isnan().sum()), int(values.isinf().sum()))
    assert expected[0] > 0
    assert count_odd(raw.numpy().tobytes(), BY_NAME[name]) == expected


@pytest.mark.parametrize("name", FLOATS)
def test_one_is_found_whatever_its_sign(name):
    """Each sign is looked for apart."""
    dtype = getattr(torch, name)
    size, kind = dtype.itemsize, {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if size < 4:
        codes = torch.arange(256**size).to(torch.int32).to(kind[size])
    else:
        ends = [float("inf"), torch.finfo(dtype).max, 0.0, 1.0]
        odd = torch.tensor([*ends, *(-end for end in ends), float("nan")], dtype=dtype)
        codes = odd.view(kind[size])
    values = codes.view(dtype).double()
    ordinary = codes[values.isfinite()]
    assert count_odd(ordinary.numpy().tobytes(), BY_NAME[name]) == (0, 0)
    for code in codes[~values.isfinite()][:: 256 if size == 2 else 1]:
        raw = torch.cat([ordinary[:100], code[None], ordinary[-100:]]).numpy().tobytes()
        assert sum(count_odd(raw, BY_NAME[name])) == 1


def test_integers_and_nothing_are_finite():
    assert count_odd(b"\xff" * 8, BY_NAME["int64"]) == (0, 0)
    assert count_odd(b"", BY_NAME["bfloat16"]) == (0, 0)

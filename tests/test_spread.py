"""What varies most over models: exact shares of whole tensors, and the energies of these."""

import numpy as np
import pytest
import torch
from test_select import N, measured, random, small  # noqa: F401

from moeforge import kernels
from moeforge.methods import Place, _select, sce
from moeforge.methods._cut import NONE, Cut
from moeforge.methods._spread import farthest

SHAPE = (577, 520)


@pytest.fixture(autouse=True)
def unloaded():
    yield
    kernels.unload()


def tunes(scale, count=3, shape=(N,)):
    """Return a base and models whose differences from it have a scale, element by element."""
    base = random(9).standard_normal(shape) * 0.02
    more = [random(i).standard_normal(shape) * scale for i in range(count)]
    return torch.from_numpy(np.stack([base, *(base + part for part in more)])).float()


def by_row():
    return tunes(np.exp(3 * random(4).standard_normal((SHAPE[0], 1))) * 0.01, shape=SHAPE)


def of_few_bits():
    """Differences of a unit in the last place or two of bfloat16: few spreads, of many elements."""
    return tunes(5e-5).bfloat16()


def of_one_size():
    steps = random(5).integers(0, 2, (4, N))
    return torch.from_numpy(steps * 0.5).float()


KINDS = {
    "continuous": lambda: tunes(0.01),
    "two models": lambda: tunes(0.01, 2).bfloat16(),
    "four models": lambda: tunes(0.01, 4).bfloat16(),
    "seven models": lambda: tunes(0.01, 7),
    "float64": lambda: tunes(0.01).double() + 1e-9,
    "rows of different scale": by_row,
    "of few bits": of_few_bits,
    "of one size": of_one_size,
    "ascending": lambda: tunes(np.linspace(0, 1, N) ** 4),
    "mostly equal": lambda: tunes(0.01 * (random(6).random(N) < 1e-3)),
    "all equal": lambda: tunes(0.0),
}


def spread(inputs):
    """Return the spread in the inputs' own precision, in the order that few models have."""
    models = [row.numpy() for row in (inputs.float() if inputs.itemsize == 2 else inputs)[1:]]
    found = np.zeros_like(models[0])
    for i, one in enumerate(models):
        for other in models[i + 1 :]:
            found += np.square(one - other)
    return found.ravel()


def kept(inputs, share):
    """Return which elements a full stable sort selects."""
    spreads = spread(inputs)
    count = int(np.float32(np.count_nonzero(spreads)) * np.float32(share))
    expected = np.zeros(spreads.size, bool)
    expected[np.argsort(-spreads, kind="stable")[:count]] = True
    return expected


def look(inputs, share, **settings):
    files = ("varying",) if kernels.loaded() else ()
    return measured(inputs, lambda place: farthest(share, place), files=files, **settings)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.2, 0.9])
def test_a_share_is_that_of_a_full_stable_sort(kind, share):
    inputs = KINDS[kind]()
    cut, energies = look(inputs, share)
    if kind != "seven models":  # whose spread is added up otherwise
        expected = kept(inputs, share)
        assert np.array_equal(cut(torch.from_numpy(spread(inputs)), 0).numpy() > 0, expected)
        parts = (inputs[1:].double() - inputs[0].double()).reshape(len(inputs) - 1, -1).numpy()
        exact = np.square(parts[:, expected]).sum(1)
        assert energies == pytest.approx(exact.tolist(), rel=1e-6)
    assert look(inputs, share, slices=2**17, workers=3) == (cut, energies)
    if inputs.itemsize <= 4:
        assert kernels.load(["varying"], narrow=inputs.itemsize == 2)
        assert look(inputs, share, slices=2**17) == (cut, energies)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("kind", "held"), [("continuous", 2**9), ("of few bits", 2**12)])
def test_of_more_than_is_held_energies_are_added_up_later(monkeypatch, kind, held):
    """Where the distinct values are too many, too, and where they can be held."""
    inputs = KINDS[kind]()
    cut, energies = look(inputs, 0.9)
    monkeypatch.setattr(_select, "_HELD", held)
    later = look(inputs, 0.9)
    assert later[0] == cut
    assert later[1] == pytest.approx(energies, rel=1e-6)
    assert look(inputs, 0.9, slices=2**17, workers=3) == later


def test_small_tensors_are_sorted():
    inputs = tunes(0.01, shape=(70, 50))
    for share in (-1.0, 0.0, 0.01, 0.5):
        cut, energies = look(inputs, share)
        expected = kept(inputs, max(share, 0.0))
        assert np.array_equal(cut(torch.from_numpy(spread(inputs)), 0).numpy() > 0, expected)
        assert len(energies) == 3
        assert all(energies) is (share > 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_merges_of_few_models_give_the_bits_of_torch(count, dtype):
    """With a border within a stretch, signs that cancel out, and zeros of both signs."""
    inputs = tunes(0.01, count, (5000,)).to(dtype)
    inputs[:, :40], inputs[0, 20:60], inputs[:, 60:80] = 0.0, -0.0, -0.0
    inputs[1:, 80:1080] = inputs[0, 80:1080]
    inputs[1, 80:1080] *= 1.25
    inputs[-1, 80:1080] *= 0.75
    place, weights = Place((9000,), 1000), tuple(0.1 + 0.2 * i for i in range(count))
    equal = float(spread(inputs)[2500])
    for cut in (None, NONE, Cut(0.0, 4000), Cut(equal, 3499), Cut(equal, 3500), Cut(equal, 9000)):
        by_torch = sce.merge(inputs.float().clone(), {}, (cut, weights), place)
        assert kernels.load(["varying"], narrow=dtype == torch.bfloat16)
        by_kernels = sce.merge(inputs, {}, (cut, weights), place)
        kernels.unload()
        assert torch.equal(by_torch.view(torch.int32), by_kernels.view(torch.int32))

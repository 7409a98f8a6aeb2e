"""Selection by magnitude: exact thresholds of whole tensors against a full stable sort."""

import math

import numpy as np
import pytest
import torch

from moeforge import methods
from moeforge.engine import jobs, slices
from moeforge.engine.evaluate import Evaluator
from moeforge.engine.pool import Pool
from moeforge.errors import BuildError
from moeforge.methods import Method, _counted, _select, _target
from moeforge.methods._cut import NONE, Cut
from moeforge.methods._select import cuts
from moeforge.plans import Merge, Plan, PlannedTensor, Read
from moeforge.sources.memory import MemorySource
from moeforge.tensors import BY_NAME, TensorSpec

N = 300_011
"""Elements of most tensors here: several chunks, once chunks are made small."""


@pytest.fixture
def small(monkeypatch):
    """Make everything small that decides how a tensor is looked through."""
    monkeypatch.setattr(_select, "SMALL", 2**12)
    monkeypatch.setattr(slices, "CHUNK", 2**17)
    monkeypatch.setattr(_select, "CHUNK", 2**17)


class Nowhere:
    """A sink that keeps nothing."""

    def write(self, shard, data, offset):
        pass


def find(quantities, wanted, **settings):
    """Return the cuts that the engine finds in quantities [quantities, …] by a method for it."""
    quantities = torch.as_tensor(np.asarray(quantities))
    return measured(
        quantities,
        lambda place: cuts(lambda tensors, here: tensors.abs(), wanted, place),
        **settings,
    )


def measured(
    quantities, measurement, *, slices=2**16, workers=1, rows=False, nested=False, files=()
):
    """Return what a measurement finds in tensors [inputs, …]; `files` are its kernels."""
    name = str(quantities.dtype).removeprefix("torch.")
    spec = TensorSpec(BY_NAME[name], tuple(quantities.shape[1:]))
    sources = {
        str(i): MemorySource(
            str(i), {"x": (spec, quantity.flatten().view(torch.uint8).numpy().tobytes())}
        )
        for i, quantity in enumerate(quantities)
    }
    caught = []

    def measure(params, place):
        caught.append((yield from measurement(place)))

    probe = Method(
        *("Probe", lambda t, *_: t[0], {}, (1, None)),
        measure=measure,
        rows=lambda params: rows,
        kernels=files,
    )
    same = methods.load("linear")
    inputs = tuple(Read(key, "x") for key in sources)
    if nested:
        once = (("weight", (1.0,)), ("normalize", False))
        inputs = tuple(Merge("linear", (read,), once) for read in inputs)
    expr = Merge("probe", inputs)
    plan = Plan("merge", (PlannedTensor("y", spec, expr),), {}, sources, sources["0"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "load", lambda word: probe if word == "probe" else same)
        patch.setattr("moeforge.engine.pool._POLL", 0.001)
        job = jobs.MergeJob("y", expr, spec.numel, spec.dtype, plan, "", 0, Nowhere())
        Pool(workers, lambda done: None).run([job], lambda: Evaluator(plan, slices))
    return caught[0]


def agree(quantities, wanted, **settings):
    """Assert that cuts keep exactly what comes first in a stable sort from the largest down."""
    found = find(quantities, wanted, **settings)
    for quantity, counts, mine in zip(quantities, wanted, found, strict=True):
        magnitudes = np.abs(np.asarray(quantity)).ravel()
        order = np.argsort(-magnitudes, kind="stable")
        for k, cut in zip(counts, mine, strict=True):
            expected = np.zeros(magnitudes.size, bool)
            expected[order[: max(k, 0)]] = True
            kept = cut(torch.from_numpy(magnitudes), 0).numpy()
            assert np.array_equal(kept > 0, expected), (k, cut)
            assert k <= 0 or cut.value == magnitudes[order[k - 1]]
    return found


def random(seed=0):
    return np.random.default_rng(seed)


def bfloat16_differences():
    a, b = (torch.from_numpy(random(s).standard_normal(N) * 0.02).bfloat16() for s in (1, 2))
    return (a.float() - (a.float() + 0.01 * b.float()).bfloat16().float()).numpy()


def rows_of_different_scale():
    scale = np.exp(3 * random(4).standard_normal((577, 1)))
    return (random(5).standard_normal((577, 520)) * scale).astype(np.float32)


def with_an_outlier_run():
    values = random(6).standard_normal(N).astype(np.float32)
    values[100_000:100_300] *= 1e6
    return values


KINDS = {
    "continuous": lambda: random().standard_normal(N).astype(np.float32),
    "differences of bfloat16": bfloat16_differences,
    "all equal": lambda: np.full(N, -0.25, np.float32),
    "all zero": lambda: np.zeros(N, np.float32),
    "mostly zero": lambda: (random(3).standard_normal(N) * (random(8).random(N) < 1e-3)).astype(
        np.float32
    ),
    "two values": lambda: np.where(random(9).random(N) < 0.3, 1.0, -2.0).astype(np.float32),
    "rows of different scale": rows_of_different_scale,
    "an outlier run": with_an_outlier_run,
    "ascending": lambda: np.sort(random(7).random(N)).astype(np.float32),
    "descending": lambda: np.sort(random(7).random(N)).astype(np.float32)[::-1].copy(),
    "tiny": lambda: (random().standard_normal(N) * 1e-41).astype(np.float32),
    "float64": lambda: random().standard_normal(N),
    "float64 that float32 cannot tell apart": lambda: 1 + random().random(N) * 1e-9,
}
COUNTS = [0, 1, 2, 1000, N // 10, N // 2, int(N * 0.9), N - 1, N]


@pytest.mark.parametrize("kind", KINDS)
def test_cuts_are_those_of_a_full_stable_sort(small, kind):
    values = KINDS[kind]()
    counts = [min(k, values.size) for k in COUNTS]
    found = agree([values], [counts])
    assert found == agree([values], [counts], slices=2**17, workers=3)
    # A nested merge is sampled in coarse runs, and so are whole rows.
    agree([values], [counts], nested=True)
    assert agree([values], [counts], rows=True) == find(
        [values], [counts], rows=True, slices=2**18, workers=2
    )


def test_small_tensors_are_sorted():
    values = random().integers(-5, 5, 4000).astype(np.float32)
    agree([values], [[-3, 0, 1, 17, 2000, 3999, 4000]])
    agree([values[:1]], [[0, 1]])
    assert find([values], [[0]]) == [[NONE]]


def test_a_large_tensor_with_nothing_made_small():
    """Two chunks of the real size, several counts of several quantities at once."""
    n = slices.CHUNK + 300_007
    one = torch.from_numpy(random(1).standard_normal(n).astype(np.float32)).bfloat16().float()
    two = random(2).standard_normal(n).astype(np.float32)
    counts = [[n // 5, n - 1], [n // 100, 0]]
    assert agree([one.numpy(), two], counts) == find(
        np.stack([one.numpy(), two]), counts, slices=2**19, workers=2
    )


def test_several_quantities_that_have_nothing_in_common(small):
    values = [KINDS[kind]() for kind in ("continuous", "all equal", "mostly zero", "ascending")]
    agree(values, [[5, N - 5, 77_777], [], [200], [0, N]])


LIES = [(0.0, 1e-30), (1e30, math.inf), (1.0, 1.0), (0.3, 0.3), (0.0, 0.0), (0.0, math.inf)]


@pytest.mark.parametrize("lie", LIES, ids=str)
@pytest.mark.parametrize("kind", ["continuous", "two values", "mostly zero"])
def test_a_bracket_that_misses_is_mended(small, monkeypatch, kind, lie):
    def bracket(self, runs):
        self._low, self._high = lie

    monkeypatch.setattr(_target.Target, "bracket", bracket)
    values = KINDS[kind]()
    agree([values], [[1, N // 100, N // 2, N - 1, N]])


def test_a_sample_that_is_not_like_the_rest(small, monkeypatch):
    values = KINDS["ascending"]()
    for place in (0, N // 2, N - 4096):
        monkeypatch.setattr(jobs, "sample_runs", lambda *_, place=place: ((place, 4096),))
        agree([values], [[10, N // 2, N - 10]])


@pytest.mark.parametrize("kind", ["continuous", "ascending", "float64", "rows of different scale"])
def test_too_many_distinct_values_are_told_apart_in_more_passes(small, monkeypatch, kind):
    monkeypatch.setattr(_select, "_HELD", 2**9)
    for room in (_target, _counted):
        monkeypatch.setattr(room, "RESOLUTION", 4)
    rounded = []
    merge = _counted.merge

    def spy(pieces):
        rounded.append(any(piece.rounded for piece in pieces))
        return merge(pieces)

    for room in (_target, _counted):
        monkeypatch.setattr(room, "merge", spy)
    values = KINDS[kind]()
    counts = [[3, N // 7, N // 2, values.size - 3]]
    assert agree([values], counts) == find([values], counts, slices=2**17, workers=3)
    assert any(rounded)


@pytest.mark.parametrize("large", [True, False], ids=["streamed", "sorted"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_where_they_count(small, bad, large):
    values = random().standard_normal(N if large else 4000).astype(np.float32)
    for where in (slice(None), slice(0, 3), slice(-1, None)):
        spoilt = values.copy()
        spoilt[where] = bad
        # NaN sorts last, infinite values first: one of these counts meets them.
        for k in (values.size,) if math.isnan(bad) else (1,):
            with pytest.raises(BuildError, match=r"y: .*(infinite|NaN)"):
                find([spoilt], [[k]])


def test_a_cut_trims_a_slice_to_what_it_keeps():
    for dtype in (torch.float32, torch.float64):
        values = torch.tensor([1.0, -2.0, 2.0, 0.5, 2.0, -3.0, 0.0], dtype=dtype)
        for cut in (Cut(2.0, 2), Cut(2.0, 99), Cut(0.0, 6), Cut(0.0, 3), Cut(1e-45, 6), NONE):
            for start in (0, 1, 2, 3, 7):
                here = values.clone()
                cut.trim(here, start)
                assert torch.equal(here, values * cut(values.abs(), start)), (cut, start)

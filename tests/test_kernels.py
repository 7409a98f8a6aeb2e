"""Compiled arithmetic: the same bits as torch's, for every method that has some."""

import gc
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moeforge import catalog, engine, kernels, methods
from moeforge.engine import Settings, processes
from moeforge.output.layout import lay_out
from moeforge.plans import Merge, Plan, PlannedTensor, Read
from moeforge.sources.memory import MemorySource
from moeforge.tensors import BY_NAME, TensorSpec

THREE = {"weight": (None, 1.0, 1.0, 1.0), "density": (None, 0.5, 0.3, 0.5), "lambda": 1.0}
UNEQUAL = {**THREE, "weight": (None, 0.3, 0.5, -0.7), "density": (None, 0.5, 1.0, 0.0)}
DRAWN = {"normalize": False, "rescale": True, "key": 7}
GAMMA = {"gamma": (None, 0.01, 0.1, 0.0), "normalize": False, "rescale": False}
CASES = [
    ("linear", {"weight": (0.5, 0.2, 0.1, 0.2), "normalize": True}),
    ("linear", {"weight": (1.0, -0.4, 0.1, 0.2), "normalize": False}),
    ("slerp", {"t": 0.4}),
    ("task_arithmetic", {**THREE, "normalize": False, "rescale": False}),
    ("task_arithmetic", {**UNEQUAL, "normalize": True, "rescale": False, "lambda": 0.7}),
    ("ties", {**THREE, "normalize": True, "rescale": False}),
    ("ties", {**UNEQUAL, "normalize": True, "rescale": True, "lambda": 0.7}),
    ("ties", {**UNEQUAL, "normalize": False, "rescale": False}),
    ("dare_ties", {**THREE, **DRAWN}),
    ("dare_ties", {**UNEQUAL, **DRAWN, "rescale": False}),
    ("dare_linear", {**UNEQUAL, **DRAWN, "normalize": True}),
    ("breadcrumbs", {**THREE, **GAMMA}),
    ("breadcrumbs_ties", {**UNEQUAL, **GAMMA, "normalize": True}),
    ("della", {**THREE, **DRAWN, "epsilon": (None, 0.1, 0.2, 0.1)}),
    ("della_linear", {**THREE, **DRAWN, "epsilon": (None, 0.1, 0.2, 0.1)}),
    ("model_stock", {"filter_wise": False}),
    ("model_stock", {"filter_wise": True}),
    ("sce", {"select_topk": 0.2}),
    ("sce", {"select_topk": 1.0}),
]


@pytest.fixture
def quick(monkeypatch):
    """Sort only the smallest tensors, so that thresholds are looked for by passes."""
    from moeforge.methods import _select

    monkeypatch.setattr(_select, "SMALL", 2**12)


@pytest.fixture(autouse=True)
def unloaded():
    yield
    kernels.unload()


def models(shape, dtype):
    """A base and three fine-tunes: rows of several scales, zeros of both signs, a row untouched."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(shape, generator=generator) * 0.02
    base[0, ::3], base[1, ::2] = 0.0, -0.0
    scales = torch.rand(shape[0], 1, generator=generator) * 0.003
    found = [base]
    for _ in range(3):
        tune = base + torch.randn(shape, generator=generator) * scales
        tune[0, ::2], tune[2] = -0.0, base[2]
        found.append(tune)
    return [tensor.to(dtype) for tensor in found]


def plan_of(word, params, inputs, out=None):
    name = str(inputs[0].dtype).removeprefix("torch.")
    spec = TensorSpec(BY_NAME[name], tuple(inputs[0].shape))
    made = TensorSpec(BY_NAME[out or name], spec.shape)
    count = 2 if word == "slerp" else len(inputs)
    sources = {
        str(i): MemorySource(
            str(i), {"x": (spec, tensor.flatten().view(torch.uint8).numpy().tobytes())}
        )
        for i, tensor in enumerate(inputs[:count])
    }
    reads = tuple(Read(key, "x") for key in sources)
    tensors = [
        PlannedTensor(f"y{i}", made, Merge(word, reads, tuple(params.items()))) for i in range(2)
    ]
    return Plan("merge", tuple(tensors), {}, sources, sources["0"])


def built(plan, folder, settings=None):
    folder.mkdir()
    engine.run(plan, lay_out(plan.tensors), folder, settings or Settings(1, 2**16))
    return load_file(folder / "model.safetensors")


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("word", "params"), CASES)
def test_they_give_the_bits_of_torch(quick, tmp_path, monkeypatch, word, params, dtype):
    plan = plan_of(word, params, models((37, 2051), dtype))
    by_torch = built(plan, tmp_path / "torch")
    monkeypatch.setattr(kernels, "WORTH", dict.fromkeys(kernels.WORTH, 0))
    by_kernels = built(plan, tmp_path / "kernels")
    assert kernels.loaded()
    for name, tensor in by_torch.items():
        assert torch.equal(bits(tensor), bits(by_kernels[name]))


@pytest.mark.parametrize("row", [600, 2**15 + 77])
@pytest.mark.parametrize("kind", ["few", "zero", "near", "mixed", "one large", "all kinds"])
def test_ranks_found_by_tables_are_those_of_sorting(kind, row):
    """Where many are equal, or all, or none although they are alike; or where they span much."""
    from moeforge.methods import Place
    from moeforge.methods._rank import large

    generator = torch.Generator().manual_seed(2)
    magnitudes = torch.randn(3, row, generator=generator).abs()
    if kind == "few":
        magnitudes = (magnitudes * 8).round() / 8
    elif kind == "zero":
        magnitudes.zero_()
    elif kind == "near":
        magnitudes = 1.0 + magnitudes * 1e-5
    elif kind == "mixed":  # many equal ones, and a few that share their upper bits
        magnitudes = (magnitudes * 8).round() / 8
        magnitudes[:, ::9] += magnitudes[:, ::9].roll(1, 1) * 2**-12 + 2**-20
    elif kind == "one large":
        magnitudes[:, 3] = 3e38
    else:
        magnitudes = magnitudes**40
    params = {"density": (None, 0.5), "epsilon": (None, 0.3), "key": 7}
    arguments = (0, magnitudes.flatten(), params, Place((3, row), 0))
    sorted_ = large(*arguments)
    assert kernels.load(["drawing", "thinning"], narrow=True)
    assert (large(*arguments) == sorted_).all()


@pytest.mark.parametrize("size", [20, 64, 77])  # vectors of 32, what is left over, and both
def test_elements_are_listed_in_order(size):
    from moeforge.kernels.listing import marked, sift

    random = np.random.default_rng(0)
    drawn = random.integers(-(2**15), 2**15, size).astype(np.int16)
    bins = random.integers(2**11, size=size).astype(np.uint16)
    bins[3::5] = 0
    lows, highs = np.sort(random.integers(2**16, size=(2, 32)), axis=0).astype(np.uint16)
    drawn[::7] = lows[bins[::7] % 32].astype(int) - 2**15
    drawn[3::7] = highs[bins[3::7] % 32].astype(int) - 2**15
    kept, found = np.zeros(size, np.uint8), np.zeros((2, size + 32), np.uint16)
    ends = marked(bins, found[0]), sift(drawn, bins, lows, highs, kept, found[1])
    draws, columns = drawn.astype(int) + 2**15, bins % 32
    assert np.array_equal(found[0, : int(ends[0])], np.flatnonzero(bins))
    assert np.array_equal(kept, draws < lows[columns])
    left = (draws >= lows[columns]) & (draws < highs[columns])
    assert np.array_equal(found[1, : int(ends[1])], np.flatnonzero(left))


@pytest.mark.parametrize(
    ("shape", "epsilon"),
    [((4, 300), 0.1), ((4000, 40), 0.1), ((3, 70_000), 0.1), ((700, 300), 0.4999999)],
)
def test_rows_of_all_lengths_are_thinned_alike(tmp_path, monkeypatch, shape, epsilon):
    """Short and long ones, and such as need all draws and one more, are sorted; not the first.

    The short and the last are many, which kernels are handed in several groups at a time.
    """
    params = {
        **THREE,
        **DRAWN,
        "density": (None, 0.5, 0.5, 1.0),
        "epsilon": (None, epsilon, 0.2, 0),
    }
    plan = plan_of("della", params, models(shape, torch.bfloat16))
    by_torch = built(plan, tmp_path / "torch")["y0"]
    monkeypatch.setattr(kernels, "WORTH", dict.fromkeys(kernels.WORTH, 0))
    assert torch.equal(bits(by_torch), bits(built(plan, tmp_path / "kernels")["y0"]))


@pytest.mark.parametrize("word", ["ties", "breadcrumbs"])
def test_of_equal_differences_the_same_ones_belong(quick, tmp_path, monkeypatch, word):
    """Where a cut lies among neighbours of one magnitude, what is kept is a matter of place."""
    params = next(params for name, params in CASES if name == word)
    base = torch.zeros(37, 2051)
    plan = plan_of(word, params, [(base + step).bfloat16() for step in (0.0, 0.5, -0.25, 0.125)])
    by_torch = built(plan, tmp_path / "torch")["y0"]
    monkeypatch.setattr(kernels, "WORTH", dict.fromkeys(kernels.WORTH, 0))
    assert torch.equal(by_torch, built(plan, tmp_path / "kernels")["y0"])
    assert len(by_torch.unique()) > 1


@pytest.mark.parametrize("shape", [(300,), (37, 2051)])
def test_of_nothing_selected_no_spread_is_large_enough(quick, tmp_path, monkeypatch, shape):
    """Squares of such differences are infinite in float32."""
    inputs = [torch.full(shape, 1e30) * i for i in range(4)]
    plan = plan_of("sce", {"select_topk": 0.0}, inputs)
    monkeypatch.setattr(kernels, "WORTH", dict.fromkeys(kernels.WORTH, 0))
    assert torch.equal(built(plan, tmp_path / "kernels")["y0"], inputs[0])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("word", ["linear", "ties"])
def test_what_is_made_may_be_of_another_dtype(quick, tmp_path, monkeypatch, word, dtype):
    params = next(params for name, params in CASES if name == word)
    plan = plan_of(word, params, models((37, 2051), torch.bfloat16), dtype)
    by_torch = built(plan, tmp_path / "torch")["y0"]
    monkeypatch.setattr(kernels, "WORTH", dict.fromkeys(kernels.WORTH, 0))
    by_kernels = built(plan, tmp_path / "kernels")["y0"]
    assert str(by_kernels.dtype) == f"torch.{dtype}"
    assert torch.equal(bits(by_torch), bits(by_kernels))


def test_bfloat16_is_rounded_as_torch_does():
    assert kernels.load(["sums"], narrow=False)
    from moeforge.kernels.sums import weighted

    generator = torch.Generator().manual_seed(3)
    every = torch.randint(-(2**31), 2**31, (100_000,), generator=generator, dtype=torch.int64)
    halves = torch.arange(2**16) * 2**16 + 2**15  # between two neighbours, for each of them
    values = torch.cat([every.int(), halves.int()]).view(torch.float32)
    out = torch.empty(len(values), dtype=torch.bfloat16)
    weighted(values.numpy()[None], np.ones(1, np.float32), kernels.matrix(out))
    expected = values.bfloat16()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(bits(out)[~out.isnan()], bits(expected)[~out.isnan()])


@pytest.mark.parametrize("size", [13, 64, 77])  # less than a vector of 16, whole ones, and both
def test_what_lies_in_a_range_is_collected_in_order(size):
    from moeforge.kernels.counting import ROOM, collect

    values = np.abs(np.random.default_rng(0).standard_normal(size, np.float32))
    values[5], values[-3] = 0.3, 0.9
    first, stop = np.array([0.3, 0.9], np.float32).view(np.uint32)
    out = np.zeros(values.size + ROOM, np.uint32)
    count = collect(values.view(np.uint32), first, np.uint32(stop - first), out, np.uint64(0))
    expected = values[(values >= np.float32(0.3)) & (values < np.float32(0.9))]
    assert np.array_equal(out[: int(count)].view(np.float32), expected)


def test_elements_of_a_magnitude_are_found_by_number():
    from moeforge.kernels.counting import where

    random = np.random.default_rng(0)
    matrix = random.integers(-3, 4, (3, 2500)).astype(np.float32)
    for row in (1, 2):
        for value in (0.0, 2.0, 9.0):
            expected = np.flatnonzero(np.abs(matrix[row] - matrix[0]) == value)
            assert np.array_equal(where(matrix, row, np.float32(value)), expected)


@pytest.mark.parametrize("distinct", [3, 3000])
def test_ranks_are_those_of_sorting(distinct):
    from moeforge.kernels.counting import ranked

    draw = np.random.default_rng(distinct)
    values = np.abs(draw.standard_normal(distinct, np.float32) * 0.01)[
        draw.integers(distinct, size=5000)
    ]
    ordered = np.sort(values)[::-1]
    for rank in (1, 2, 700, 4999, 5000):
        value = ordered[rank - 1]
        assert ranked(values, rank) == (value, np.count_nonzero(values >= value))


def test_garbage_is_collected_after_loading():
    assert kernels.load(["sums"], narrow=True)
    kernels.unload()
    assert gc.isenabled()


@pytest.mark.parametrize("count", [2, 3])
def test_inner_products_are_added_up_in_one_order(count):
    """The merge itself shows of them no more than the rounded ratio."""
    from moeforge.methods import Place
    from moeforge.methods.model_stock import _products

    inputs = torch.stack(models((37, 2051), torch.float32)[: count + 1]).flatten(1)
    by_torch = _products(inputs.clone(), Place((37, 2051), 0))
    assert kernels.load(["differences", "products"], narrow=False)
    by_kernels = _products(inputs, Place((37, 2051), 0))
    assert len(by_torch) == 2
    assert all((one == other).all() for one, other in zip(by_torch, by_kernels, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [0, 700, 5000])
def test_lanes_are_added_up_in_their_order(count, dtype):
    """Rows lie apart, and end anywhere; numpy must not add up in pairs."""
    from moeforge.methods._sums import LANES, lane_sums

    rows = torch.randn(3, 6000, dtype=dtype, generator=torch.Generator().manual_seed(4))[:, :count]
    expected = torch.zeros(3, LANES, dtype=dtype)
    for part in rows.split(LANES, dim=1):
        expected[:, : part.shape[1]] += part
    assert torch.equal(torch.from_numpy(lane_sums(rows)), expected)


@pytest.mark.parametrize("word", ["slerp", "dare_ties"])
def test_sums_are_added_up_in_one_order(word):
    """The merge shows of them no more than rounded factors."""
    from moeforge.methods import Place

    inputs = torch.stack(models((37, 2051), torch.float32)).flatten(1)
    params = {"t": 0.4} if word == "slerp" else {**UNEQUAL, **DRAWN, "density": (None, 0.5, 1, 0)}
    inputs, place = inputs[: 2 if word == "slerp" else 4], Place((37, 2051), 3)
    scan = next(methods.load(word).measure(params, place))
    by_torch = scan.join([scan.look(inputs.clone(), place)])
    assert kernels.load(["angles", "drawing"], narrow=False)
    by_kernels = scan.join([scan.look(inputs, place)])
    if word == "dare_ties":
        by_torch, by_kernels = by_torch[0], by_kernels[0]  # without what is held
    assert len(by_torch) >= 3
    assert by_torch == by_kernels


@pytest.mark.parametrize("shape", [(31, 2051), (70, 2051), (4000, 40)])
def test_sums_of_what_ranks_keep_are_added_up_in_one_order(shape):
    """By torch, which is handed one group of rows at a time, and compiled, of rows long or not."""
    from moeforge.methods import Place

    inputs, whole = torch.stack(models(shape, torch.float32)).flatten(1), Place(shape, 0)
    params = {**THREE, **DRAWN, "epsilon": (None, 0.1, 0.2, 0.1)}
    scan = next(methods.load("della").measure(params, whole))
    by_torch = []
    for start in range(0, whole.numel, whole.group):
        part = inputs[:, start : start + whole.group].clone()
        by_torch += scan.look(part, Place(shape, start))[0]
    assert kernels.load(["thinning"], narrow=False)
    by_kernels, _ = scan.look(inputs, whole)
    assert [tuple(sums) for sums in by_torch] == [tuple(sums) for sums in by_kernels]


@pytest.mark.parametrize("word", ["dare_ties", "dare_linear"])
@pytest.mark.parametrize("start", [1, 1027, 2046])
def test_what_is_drawn_follows_from_the_elements_number(word, start):
    from moeforge.methods import Place
    from moeforge.methods._task import Stats

    inputs = torch.stack(models((4, 1025), torch.bfloat16)).flatten(1)
    method, params = methods.load(word), {**THREE, **DRAWN, "density": (None, 0.5, 0.3, 0.9)}
    stats = [Stats(None, (2.0, 3.0, 1.1)) for _ in range(2)]
    assert kernels.load(method.kernels, narrow=True)
    whole = method.merge(inputs, params, stats[0], Place((4, 1025), 0))
    part = inputs[:, start:].contiguous()
    assert torch.equal(whole[start:], method.merge(part, params, stats[1], Place((4, 1025), start)))


@pytest.mark.parametrize("weights", [(1.0,) * 5, (-0.3,) * 5, (0.5, -0.2, 0.7, 0.1, -0.4)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_so_many_models_are_merged_as_torch_does(count, weights):
    from moeforge.methods import Place
    from moeforge.methods._task import Stats

    base, *tunes = models((4, 1025), torch.float32)
    tiny = base.clone()
    base[3, :9], tiny[3, :9] = 0.0, -(2.0**-126)
    tunes = [tiny, *tunes, 2 * base - tunes[0]]
    for tune, value in zip((base, *tunes), (0.0, 0.5, -0.5, 0.0, 0.0, 0.0), strict=True):
        tune[3, 9:20], tune[3, 20:40] = value, -0.0
    inputs = torch.stack([base, *tunes[:count]]).flatten(1)
    for word in ("ties", "task_arithmetic"):
        method, found = methods.load(word), []
        for normalize in (True, False):
            params = {"weight": (None, *weights[:count]), "density": (None, *(1.0,) * count)}
            params |= {"normalize": normalize, "lambda": 0.7}
            for ready in (False, True):
                kernels.unload()
                assert not ready or kernels.load(method.kernels, narrow=False)
                stats = Stats(None, (1.1,) * count)
                merged = method.merge(inputs.clone(), params, stats, Place((4, 1025), 0))
                found.append(bits(merged.clone()))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[2], found[3])


def test_of_sums_only_zeros_have_no_sign():
    from moeforge.methods._task import majority

    parts = torch.tensor([[0.0, -0.0, 1.0, 2.0, 2.0**-149], [0.0, -0.0, -1.0, -3.0, -(2.0**-126)]])
    assert majority(parts).tolist() == [1.0, 1.0, 1.0, -1.0, -1.0]


def test_every_method_with_kernels_is_compared_here():
    words = {word for word in catalog.names("methods") if methods.load(word).kernels}
    assert words == {word for word, _ in CASES}


@pytest.mark.parametrize("word", ["ties", "sce", "dare_ties"])
def test_they_are_what_computes_where_they_are_loaded(quick, tmp_path, monkeypatch, word):
    """Else the comparison above would be of torch with itself."""
    from moeforge.methods import _spread, _task

    def refuse(*_, **__):
        raise AssertionError("torch computed")

    monkeypatch.setattr(kernels, "WORTH", dict.fromkeys(kernels.WORTH, 0))
    monkeypatch.setattr(_task, "elect", refuse)
    monkeypatch.setattr(_spread, "spread", refuse)
    params = next(params for name, params in CASES if name == word)
    built(plan_of(word, params, models((37, 2051), torch.bfloat16)), tmp_path / "made")


@pytest.mark.skipif(not processes.AVAILABLE, reason="workers are threads here")
def test_workers_find_them_loaded(quick, tmp_path, monkeypatch):
    from moeforge.methods import _task

    params = next(params for word, params in CASES if word == "ties")
    plan = plan_of("ties", params, models((37, 2051), torch.bfloat16))
    alone = built(plan, tmp_path / "alone")
    monkeypatch.setattr(kernels, "WORTH", dict.fromkeys(kernels.WORTH, 0))
    monkeypatch.setattr(engine, "CHUNK", 2**16)  # or one worker would do
    monkeypatch.setattr(_task, "elect", None)
    together = built(plan, tmp_path / "together", Settings(2, 2**16))
    assert all(torch.equal(bits(tensor), bits(together[name])) for name, tensor in alone.items())


def test_small_builds_do_without_numba(tmp_path):
    params = next(params for word, params in CASES if word == "ties")
    built(plan_of("ties", params, models((37, 2051), torch.bfloat16)), tmp_path / "made")
    assert not kernels.loaded()


def test_without_numba_torch_computes(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("moeforge.kernels.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(kernels, "WORTH", dict.fromkeys(kernels.WORTH, 0))
    params = next(params for word, params in CASES if word == "ties")
    built(plan_of("ties", params, models((37, 2051), torch.bfloat16)), tmp_path / "made")
    assert not kernels.loaded()


def test_values_that_are_not_finite_stay_so(quick, tmp_path, monkeypatch):
    from moeforge.errors import BuildError

    monkeypatch.setattr(kernels, "WORTH", dict.fromkeys(kernels.WORTH, 0))
    params = next(params for word, params in CASES if word == "task_arithmetic")
    for bad in (float("nan"), float("inf")):
        inputs = models((37, 2051), torch.bfloat16)
        inputs[2][5, 7] = bad
        with pytest.raises(BuildError, match="y0"):
            built(plan_of("task_arithmetic", params, inputs), tmp_path / str(bad))


@pytest.mark.parametrize(("seconds", "told"), [(0.0, [(0, 1), (1, 1)]), (600.0, [])])
def test_who_waits_while_it_is_compiled_is_told(seconds, told, monkeypatch):
    heard = []
    monkeypatch.setattr(kernels, "_LONG", seconds)
    monkeypatch.setattr(kernels, "_loaded", False)
    assert kernels.load(
        ["sums"], narrow=True, compiling=lambda done, total: heard.append((done, total))
    )
    assert heard == told

"""What a GPU computes: the bytes of the CPU, or a bounded distance from them."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_costs import build
from test_crash import slerp

from moeforge import catalog, engine, forge
from moeforge.engine import Settings, evaluate
from moeforge.methods import BLOCK, Place, _gpu, _random, _rank

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

SAME = {
    *("linear", "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties"),
    *("nearswap", "passthrough"),
}
"""Methods whose sums over tensors, if any, are of integers: the same bytes as on the CPU."""
BOUND = 2.0**-20
"""Of the largest input: how far a GPU is from the CPU where its sums over tensors differ."""
ALL = [
    *("linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs"),
    *("breadcrumbs_ties", "della", "della_linear", "model_stock", "karcher", "multislerp"),
    *("nuslerp", "nearswap", "ram", "ramplus_tl", "sce", "arcee_fusion"),
]


def tensor(source):
    """Return what a source holds, flat."""
    spec = source.specs()["x"]
    raw = bytearray(2 * spec.numel)
    source.read("x", 0, memoryview(raw))
    return torch.frombuffer(raw, dtype=torch.bfloat16)


def ulps(a, b):
    """Return how many bfloat16 numbers lie between two tensors at most, element by element."""
    a, b = (t.view(torch.int16).int() for t in (a, b))
    a, b = (torch.where(v < 0, -32768 - v, v) for v in (a, b))
    return (a - b).abs()


def on(device, method, folder, **more):
    return build(method, folder, settings=Settings(device=device, **more))


@needs_gpu
@pytest.mark.parametrize("method", ALL)
def test_a_gpu_gives_what_the_cpu_gives(method, tmp_path):
    sources, expected = on("cpu", method, tmp_path / "cpu", threads=1)
    found = on("cuda", method, tmp_path / "gpu", threads=3)[1]
    apart = ulps(found, expected)
    print(
        method, "differ:", int(apart.count_nonzero()), "of", apart.numel(), "by", int(apart.max())
    )
    if method in SAME:
        assert torch.equal(found, expected)
    else:
        # One unit in the last place; or where terms cancel out, the last bits of the terms.
        inputs = [tensor(source).float().abs() for source in sources]
        largest = torch.stack(inputs).amax(0).view_as(found)
        near = (found.float() - expected.float()).abs() <= BOUND * largest
        assert bool(((apart <= 1) | near).all())
        assert apart.count_nonzero() < 1e-3 * apart.numel()
    smaller = on("cuda", method, tmp_path / "small", threads=1, slice_elements=2**17)[1]
    assert torch.equal(found, smaller)


def test_every_method_is_compared():
    assert {*ALL, "passthrough"} == {*catalog.names("methods")}


@needs_gpu
def test_all_gpus_are_used_unless_one_is_named():
    assert Settings(device="cuda").devices == [
        f"cuda:{n}" for n in range(torch.cuda.device_count())
    ]
    assert Settings(device="cuda:0").devices == ["cuda:0"]


def test_without_a_gpu_torch_is_asked_for_one(monkeypatch):
    """Then it says what is missing."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert Settings(device="cuda").devices == ["cuda"]


@pytest.mark.parametrize(
    ("gpus", "ranks", "expected"),
    [
        (4, 1, [[0, 1, 2, 3]]),
        (4, 2, [[0, 2], [1, 3]]),
        (3, 2, [[0, 2], [1]]),
        (2, 2, [[0], [1]]),
        (2, 3, [[0], [1], [0]]),
    ],
)
def test_the_ranks_of_a_machine_share_its_gpus(gpus, ranks, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    each = [Settings(device="cuda", local=(number, ranks)) for number in range(ranks)]
    assert [settings.devices for settings in each] == [
        [f"cuda:{number}" for number in numbers] for numbers in expected
    ]
    assert Settings(device="cuda:1", local=(0, 2)).devices == ["cuda:1"]


def test_workers_take_gpus_in_turn(tmp_path, monkeypatch):
    """None is at hand: what a worker computes on is noted, and the CPU used."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    real, used = evaluate.Evaluator, []

    def noting(plan, size, device, *more):
        used.append(device)
        return real(plan, size, "cpu", *more)

    monkeypatch.setattr(evaluate, "Evaluator", noting)
    monkeypatch.setattr(engine, "_workers", lambda *given: (3, False))
    build("linear", tmp_path / "out", settings=Settings(device="cuda", local=(1, 2)))
    assert sorted(used) == ["cuda:1", "cuda:1", "cuda:3"]


@needs_gpu
def test_a_gpu_without_memory_gives_way(llamas, tmp_path, monkeypatch):
    """What is asked for beyond a limit fails as it does on a card that is full."""
    forge.build(slerp(*llamas[:2]), tmp_path / "whole", verify=False)
    real, tried = evaluate.Evaluator._inputs, []

    def inputs(self, *others):
        if self.device.type == "cuda":
            tried.append(self._size)
            torch.empty(2**50, dtype=torch.uint8, device=self.device)  # the card's own refusal
        return real(self, *others)

    monkeypatch.setattr(evaluate.Evaluator, "_inputs", inputs)
    with pytest.warns(UserWarning, match="going on with the CPU"):
        forge.build(slerp(*llamas[:2]), tmp_path / "out", device="cuda", verify=False, threads=1)
    assert tried[0] > tried[-1]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


@needs_gpu
@pytest.mark.parametrize("gate", ["hidden", "fitted", "cheap_embed"])
def test_gates_on_a_gpu(gate, llamas, tmp_path):
    recipe = {
        "base_model": str(llamas[0]),
        "gate_mode": gate,
        "dtype": "float32",
        "experts": [
            {"source_model": str(model), "positive_prompts": prompts}
            for model, prompts in zip(
                llamas[1:], (["a b c", "the cat"], ["x = 1", "return y"]), strict=True
            )
        ],
    }
    forge.build(recipe, tmp_path / "cpu", verify=False)
    forge.build(recipe, tmp_path / "gpu", device="cuda", verify=False)
    expected, found = (load_file(tmp_path / d / "model.safetensors") for d in ("cpu", "gpu"))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        if "gate.weight" in name:
            assert torch.allclose(found[name], tensor, atol=2e-3), name
        else:
            assert torch.equal(found[name], tensor), name


# What is computed otherwise on a GPU, here on the CPU: torch is the same.


def test_sums_of_blocks_do_not_depend_on_what_lies_beside_them():
    values = torch.randn(3, 2 * BLOCK + 700, generator=torch.Generator().manual_seed(1))
    sums = _gpu.block_sums(values)
    assert sums.shape == (3, 3)
    for number, block in enumerate(values.split(BLOCK, 1)):
        assert torch.equal(_gpu.block_sums(block)[:, 0], sums[:, number])
        exact = block.double().sum(1)
        assert torch.allclose(sums[:, number].double(), exact, rtol=0, atol=2e-4)
    assert _gpu.block_sums(values[:, :0]).tolist() == [[0.0]] * 3


def test_gram_matrices_are_those_of_float64():
    vectors = torch.randn(3, BLOCK + 9, generator=torch.Generator().manual_seed(2))
    found = _gpu.gram(vectors)
    for matrix, block in zip(found, vectors.double().split(BLOCK, 1), strict=True):
        assert torch.allclose(matrix, block @ block.T, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("start", [0, 3, 4_000_001])
def test_draws_are_those_of_the_cpu(start):
    expected = _random.draws(0x9E3779B97F4A7C15, start, 1001)
    found = _gpu.draws(0x9E3779B97F4A7C15, start, 1001, torch.device("cpu"))
    assert found.numpy().tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("row", "density", "epsilon"),
    [(1, 0.4, 0.2), (7, 0.4, 0.2), (512, 0.4, 0.2), (512, 0.9, 0.0999999)],
)
def test_ranks_are_those_of_the_cpu(row, density, epsilon):
    # Of bfloat16, so that many are equal and share a rank.
    delta = torch.randn(row * 40, generator=torch.Generator().manual_seed(3)).bfloat16().float()
    params = {"key": 11, "density": (None, density), "epsilon": (None, epsilon)}
    expected, start = delta.clone(), 5 * row
    _rank.thin_by_rank(0, expected, params, None, Place((90, row), start))
    drawn = _gpu.draws(_random.derive(11, 0), start, len(delta), delta.device)
    _gpu.thin(delta, drawn, torch.from_numpy(_rank._bounds(density, epsilon, row)))
    assert torch.equal(delta, expected)
    assert 0 < int(delta.count_nonzero()) < len(delta)


@pytest.mark.parametrize("quantities", [[0, 1], [1, 1], [1]])
def test_magnitudes_are_counted_and_collected(quantities):
    values = torch.randint(0, 50, (2, 3000), generator=torch.Generator().manual_seed(4)).float()
    # The second bracket is a single value: nothing lies inside it.
    limits = np.array([[10, 20, 9, 20], [31, 30, 30, 30]], np.float32)[: len(quantities)]
    counts, inside = _gpu.tally(values, quantities, limits)
    for line, (first, stop, low, high) in enumerate(limits.tolist()):
        own = values[quantities[line]].tolist()
        assert counts[line] == [
            sum(v >= stop for v in own),
            sum(v == low for v in own),
            sum(v == high for v in own),
        ]
        assert inside[line].tolist() == [v for v in own if first <= v < stop]
    assert len(inside) == len(quantities)


def test_equal_magnitudes_are_found():
    assert _gpu.equal(torch.tensor([2.0, 1.0, 2.0]), 2.0).tolist() == [0, 2]

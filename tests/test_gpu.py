"""What a GPU computes: the bytes of the CPU, or a bounded distance from them."""

import pytest
import torch
from safetensors.torch import load_file
from test_costs import build
from test_crash import slerp

from moeforge import catalog, engine, forge
from moeforge.engine import Settings, evaluate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

SAME = {
    *("linear", "task_arithmetic", "ties", "dare_linear", "breadcrumbs", "breadcrumbs_ties"),
    *("nearswap", "ram", "passthrough"),
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


def test_all_gpus_are_used_unless_one_is_named():
    assert engine.devices_of("cuda") == [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    assert engine.devices_of("cuda:0") == ["cuda:0"]


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

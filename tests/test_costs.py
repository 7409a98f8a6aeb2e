"""What builds cost that needs no clock: bytes read and written, memory, draws, imports."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from moeforge import engine, kernels, methods
from moeforge.engine import Settings, buffers, evaluate, writer
from moeforge.methods import CHUNK, REQUIRED, _random, _rank, _task
from moeforge.output.layout import lay_out
from moeforge.plans import Merge, Plan, PlannedTensor, Read
from moeforge.sources.memory import MemorySource
from moeforge.tensors import BY_NAME, TensorSpec

ROW = 512
ROWS = CHUNK // ROW + 300
NUMEL = ROWS * ROW
SLICE = engine.DEFAULT_SLICE / NUMEL
"""For each threshold one slice is looked at once more; a sample is smaller than a slice."""

READS = {
    "linear": 1,
    "slerp": 2,
    "task_arithmetic": 1,
    "ties": 2 + 4 * SLICE,
    "dare_linear": 2,
    "dare_ties": 2,
    "breadcrumbs": 2 + 7 * SLICE,
    "della": 2,
    "model_stock": 2,
    "karcher": 2,
    "multislerp": 2,
    "sce": 2 + 2 * SLICE,
}
"""How often each byte of an input is read, at most; the last read makes the result."""
CHOSEN = {"density": 0.4, "epsilon": 0.1, "select_topk": 0.3, "t": 0.4}


class Counting(MemorySource):
    read_bytes = 0

    def read(self, name, start, out):
        self.read_bytes += len(out)
        super().read(name, start, out)


def counting(key, seed, rows=ROWS):
    draw = torch.Generator().manual_seed(seed)
    tensor = torch.randn(rows, ROW, generator=draw).bfloat16()
    spec = TensorSpec(BY_NAME["bfloat16"], (rows, ROW))
    return Counting(key, {"x": (spec, bytes(tensor.flatten().view(torch.uint8).numpy()))})


def build(method, folder, rows=ROWS, settings=None):
    """Build one tensor with a method, in this process; return its sources and the result."""
    entry = methods.load(method)
    most = entry.inputs[1] or 4
    most += entry.base == "optional"
    sources = [counting(str(number), number, rows) for number in range(min(most, 4))]
    params = {"key": 7} if entry.random else {}
    for name, param in entry.params.items():
        value = CHOSEN.get(name, 1.0 if param.default is REQUIRED else param.default)
        each = (value,) * len(sources)
        params[name] = value if param.scope == "shared" else each
        if param.scope == "non_base" and entry.base != "none":
            params[name] = (None, *each[1:])
    expr = Merge(method, tuple(Read(s.key, "x") for s in sources), tuple(params.items()))
    tensor = PlannedTensor("y", TensorSpec(BY_NAME["bfloat16"], (rows, ROW)), expr)
    plan = Plan("merge", (tensor,), {}, {s.key: s for s in sources}, sources[0])
    folder.mkdir()
    engine.run(plan, lay_out(plan.tensors), folder, settings or Settings(threads=1))
    return sources, load_file(folder / "model.safetensors")["y"]


@pytest.mark.parametrize("compiled", [False, True], ids=["torch", "compiled"])
@pytest.mark.parametrize("method", READS)
def test_inputs_are_read_so_often_and_the_output_is_written_once(
    method, compiled, tmp_path, monkeypatch
):
    if compiled:
        if not methods.load(method).kernels:
            pytest.skip("there is nothing compiled for it")
        monkeypatch.setattr(kernels, "WORTH", dict.fromkeys(kernels.WORTH, 0))
    written, write = [], writer.OutputFiles.write

    def counted(self, shard, data, offset):
        written.append(len(data))
        write(self, shard, data, offset)

    monkeypatch.setattr(writer.OutputFiles, "write", counted)
    sources, _ = build(method, tmp_path / "out")
    assert kernels.loaded() is compiled
    kernels.unload()
    for source in sources:
        assert 2 * NUMEL <= source.read_bytes <= READS[method] * 2 * NUMEL
    assert sum(written) == (tmp_path / "out" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("method", ["linear", "ties", "della"])
def test_memory_is_taken_once_however_large_the_tensor(method, tmp_path, monkeypatch):
    taken = []

    class Counted(buffers.Buffer):
        def __init__(self, nbytes, **more):
            taken.append(nbytes)
            super().__init__(nbytes, **more)

    for room in (buffers, evaluate):
        monkeypatch.setattr(room, "Buffer", Counted)
    build(method, tmp_path / "one", CHUNK // ROW)
    one = list(taken)
    taken.clear()
    build(method, tmp_path / "three", 3 * CHUNK // ROW)
    assert len(taken) == len(one) > 0


@pytest.mark.parametrize(("method", "room"), [("dare_ties", _random), ("della", _rank)])
def test_draws_are_made_once_and_held_where_they_fit(method, room, tmp_path, monkeypatch):
    drawn, draws = [], _random.draws

    def counted(key, start, count):
        drawn.append(count)
        return draws(key, start, count)

    monkeypatch.setattr(room, "draws", counted)
    _, held = build(method, tmp_path / "held")
    assert sum(drawn) == 3 * NUMEL
    monkeypatch.setattr(_task, "HELD", 0)
    _, again = build(method, tmp_path / "again")
    assert sum(drawn) == (3 + 6) * NUMEL
    assert torch.equal(held.view(torch.int16), again.view(torch.int16))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_few_parts_are_those_of_torch_to_the_bit(count, dtype):
    draw = torch.Generator().manual_seed(count)
    parts = torch.randn(count, 70_001, generator=draw, dtype=dtype)
    parts[:, :9] = -0.0
    expected = parts.sum(0)
    found = _task.summed(parts)
    assert torch.equal(found, expected)
    assert torch.equal(found.signbit(), expected.signbit())


@pytest.mark.parametrize(
    ("method", "heavy"), [("linear", "transformers"), ("passthrough", "torch")]
)
def test_models_without_a_tokenizer_are_built_without_importing_more(
    method, heavy, models, tmp_path
):
    folders = [models("llama", seed=seed, with_tokenizer=False) for seed in (1, 2)]
    inputs = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in folders]
    recipe = {"merge_method": method, "models": inputs}
    if method == "passthrough":
        sources = [{"sources": [{"model": str(f), "layer_range": [0, 4]}]} for f in folders]
        recipe = {"merge_method": method, "slices": sources}
    code = f"import sys, moeforge; moeforge.build({recipe}, sys.argv[1], verify=False, threads=1); "
    code += f"sys.exit('{heavy}' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=True)

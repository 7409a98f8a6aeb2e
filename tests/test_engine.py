"""The engine: the same bytes however it is run, and the right ones."""

import json
import threading

import pytest
import torch
from safetensors.torch import load_file

import moeforge
from moeforge import engine, forge
from moeforge.engine import Settings
from moeforge.engine.jobs import CHUNK, copy_range
from moeforge.output.layout import lay_out
from moeforge.plans import Concat, Fill, Merge, Plan, PlannedTensor, Read
from moeforge.sources.memory import MemorySource
from moeforge.tensors import BY_NAME, TensorSpec


def source(key, seed, dtype=torch.bfloat16, shape=(CHUNK + 70_001,)):
    """A source of one big tensor "x", larger than a chunk and no multiple of any slice."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    spec = TensorSpec(BY_NAME[str(dtype).removeprefix("torch.")], tuple(shape))
    return MemorySource(
        key, {"x": (spec, bytes(tensor.flatten().view(torch.uint8).numpy()))}
    ), tensor


def plan_of(expr, sources, dtype="bfloat16", shape=(CHUNK + 70_001,)):
    tensor = PlannedTensor("y", TensorSpec(BY_NAME[dtype], tuple(shape)), expr)
    return Plan("merge", (tensor,), {}, {s.key: s for s in sources}, sources[0])


def run(plan, folder, **settings):
    folder.mkdir()
    engine.run(plan, lay_out(plan.tensors), folder, Settings(**settings))
    return load_file(folder / "model.safetensors")["y"]


A, B = Read("a", "x"), Read("b", "x")
LINEAR = Merge("linear", (A, B), (("weight", (1.0, 2.0)), ("normalize", True)))
NESTED = Merge("slerp", (Merge("slerp", (A, B), (("t", 0.4),)), LINEAR), (("t", 0.7),))


@pytest.mark.parametrize("expr", [LINEAR, NESTED], ids=["linear", "slerp of a slerp and a mean"])
def test_bytes_do_not_depend_on_threads_or_slices(expr, tmp_path):
    plan = plan_of(expr, [source("a", 1)[0], source("b", 2)[0]])
    first = run(plan, tmp_path / "first", threads=1, slice_elements=2**16)
    for number, (threads, size) in enumerate([(1, 2**20), (2, 2**18), (5, 2**17)]):
        other = run(plan, tmp_path / str(number), threads=threads, slice_elements=size)
        assert torch.equal(first, other)


def test_a_nested_merge_is_computed_in_float32_and_rounded_once(tmp_path):
    (one, a), (two, b) = source("a", 1), source("b", 2)
    half = Merge("linear", (A, B), (("weight", (0.3, 0.3)), ("normalize", False)))
    expr = Merge("linear", (half, B), (("weight", (1.0, 0.1)), ("normalize", False)))
    result = run(plan_of(expr, [one, two]), tmp_path / "out")
    exact = 0.3 * a.double() + 0.4 * b.double()
    error = (result.double() - exact).abs()
    # One rounding to 8 significant bits, plus float32's own; a second rounding would show.
    assert bool((error <= exact.abs() * 2**-8 * 1.001 + 1e-7).all())
    twice = (0.3 * a.double() + 0.3 * b.double()).bfloat16().double() + 0.1 * b.double()
    assert not bool(((twice.bfloat16().double() - exact).abs() <= exact.abs() * 2**-8).all())


def test_float64_inputs_are_computed_in_float64(tmp_path):
    (one, a), (two, b) = source("a", 1, torch.float64), source("b", 2, torch.float64)
    result = run(plan_of(LINEAR, [one, two], "float64"), tmp_path / "out")
    assert (result - (a + 2 * b) / 3).abs().max() < 1e-14


def test_pieces_lie_one_after_the_other(tmp_path):
    (one, a), (two, b) = source("a", 1, shape=(3, 5)), source("b", 2, shape=(2, 5))
    spec = TensorSpec(BY_NAME["bfloat16"], (3, 5))
    zeros = TensorSpec(BY_NAME["bfloat16"], (1, 5))
    two_rows = TensorSpec(BY_NAME["bfloat16"], (2, 5))
    expr = Concat(((A, spec), (Fill(0.25), zeros), (B, two_rows)))
    result = run(plan_of(expr, [one, two], shape=(6, 5)), tmp_path / "out")
    assert torch.equal(result, torch.cat([a, torch.full((1, 5), 0.25).bfloat16(), b]))


def test_empty_and_scalar_tensors(tmp_path):
    for number, shape in enumerate([(), (0,), (3, 0)]):
        (one, a), (two, b) = source("a", 1, shape=shape), source("b", 2, shape=shape)
        result = run(plan_of(LINEAR, [one, two], shape=shape), tmp_path / str(number))
        assert result.shape == shape
        assert torch.allclose(result.float(), (a.float() + 2 * b.float()) / 3, rtol=2**-8)


def test_copies_fall_back_where_the_kernel_cannot(tmp_path, monkeypatch):
    import errno
    import os

    data = os.urandom(3_000_000)
    (tmp_path / "in").write_bytes(data)

    def refuse(*args):
        raise OSError(errno.EXDEV, "cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    with (tmp_path / "in").open("rb") as reader, (tmp_path / "out").open("wb") as writer:
        done = 0
        while done < len(data) - 5:
            done += copy_range(
                reader.fileno(), writer.fileno(), len(data) - 5 - done, 5 + done, done
            )
    assert (tmp_path / "out").read_bytes() == data[5:]


class Failing(MemorySource):
    def read(self, name, start, out):
        if start > 2**20:
            raise OSError("the disk is gone")
        super().read(name, start, out)


def test_a_failing_read_names_the_tensor(tmp_path):
    good, tensor = source("a", 1)
    bad = Failing(
        "b", {"x": (good.specs()["x"], bytes(tensor.flatten().view(torch.uint8).numpy()))}
    )
    before = threading.active_count()
    with pytest.raises(moeforge.errors.BuildError, match=r"y: the disk is gone"):
        run(plan_of(NESTED, [good, bad]), tmp_path / "out")
    assert threading.active_count() == before, "workers ended"


def test_memory_limit_makes_slices_smaller():
    plan = plan_of(LINEAR, [source("a", 1)[0], source("b", 2)[0]])
    generous, tight = Settings(threads=2), Settings(threads=2, memory=300_000_000)
    assert tight.slice_for(plan) < generous.slice_for(plan)
    assert engine.peak_memory(plan, tight) < engine.peak_memory(plan, generous)


def test_wide_elements_come_first_so_that_all_are_aligned():
    tensors = [
        PlannedTensor("half", TensorSpec(BY_NAME["bfloat16"], (3,)), Fill(0)),
        PlannedTensor("byte", TensorSpec(BY_NAME["uint8"], (5,)), Fill(0)),
        PlannedTensor("wide", TensorSpec(BY_NAME["float32"], (2,)), Fill(0)),
    ]
    (shard,) = lay_out(tensors)
    assert [entry.tensor.name for entry in shard.entries] == ["wide", "half", "byte"]
    for entry in shard.entries:
        assert entry.offset % entry.tensor.spec.dtype.itemsize == 0
    assert shard.nbytes == len(shard.header) + 8 + 6 + 5
    length = int.from_bytes(shard.header[:8], "little")
    assert json.loads(shard.header[8:])["__metadata__"] == {"format": "pt"}
    assert length == len(shard.header) - 8


def test_whole_builds_are_the_same_bytes_however_they_are_run(llamas, tmp_path):
    recipe = {
        "merge_method": "slerp",
        "base_model": str(llamas[0]),
        "models": [{"model": str(folder)} for folder in llamas[:2]],
        "parameters": {"t": 0.3},
        "dtype": "bfloat16",
    }
    forge.build(recipe, tmp_path / "one", threads=1)
    forge.build(recipe, tmp_path / "four", threads=4, memory=320_000_000)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "four" / file).read_bytes()
    forge.build(recipe, tmp_path / "shards", shard_size=50_000)
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 3
    together = {name: t for shard in shards for name, t in load_file(shard).items()}
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert together.keys() == whole.keys()
    assert all(torch.equal(together[name], whole[name]) for name in whole)

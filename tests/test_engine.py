"""The engine: the same bytes however it is run, and the right ones."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from test_crash import RECIPES

import moeforge
from moeforge import engine, forge, kernels
from moeforge.engine import Settings, processes, reading, seal, slices
from moeforge.engine.evaluate import Evaluator
from moeforge.engine.jobs import CopyJob
from moeforge.engine.reading import Reader
from moeforge.engine.rows import Whole
from moeforge.errors import BuildError
from moeforge.methods import BLOCK, CHUNK, _select
from moeforge.output.layout import Shard, lay_out
from moeforge.plans import (
    Concat,
    Fill,
    Gather,
    Lora,
    Merge,
    Plan,
    PlannedTensor,
    Read,
    RowTable,
)
from moeforge.sealed import Sealed
from moeforge.sources import FileSpan
from moeforge.sources.folder import FolderSource
from moeforge.sources.memory import MemorySource
from moeforge.system import copy_range
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


@pytest.mark.parametrize("whole", [True, False])
def test_copies_wait_for_what_is_hashed_but_for_one(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(seal, "_BEHIND", 100)
    data, told = os.urandom(400), {}
    (tmp_path / "f").write_bytes(data if whole else data[:50])
    span, dtype = FileSpan(tmp_path / "in", 0, 200), BY_NAME["bfloat16"]
    copies = [CopyJob("y", A, span, dtype, "f", start, None) for start in (0, 200)]
    shard = Shard("f", b"", (), len(data))
    with seal.Sealer(tmp_path, [shard], copies, 2, told.__setitem__) as sealer:
        first, last = (threading.Thread(target=sealer.complete, args=(c,)) for c in copies)
        first.start()
        first.join(0.05)
        assert first.is_alive(), "200 bytes are not hashed"
        last.start()
        last.join(10)
        assert not last.is_alive(), "one worker goes on"
        assert first.is_alive()
        sealer.start()
        first.join(10)
        assert not first.is_alive()
        with nullcontext() if whole else pytest.raises(BuildError, match="f does not get onto"):
            sealer.finish()
    assert told == ({"f": Sealed(blake3(data).hexdigest(), 400)} if whole else {})


def test_headers_of_files_to_come_hold_back_no_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(seal, "_BEHIND", 100)
    copy = CopyJob("y", A, FileSpan(tmp_path, 0, 1), BY_NAME["uint8"], "f", 200, None)
    shards = [Shard("f", bytes(200), (), 201)]
    with seal.Sealer(tmp_path, shards, [copy], 2, {}.__setitem__) as sealer:
        worker = threading.Thread(target=sealer.complete, args=(copy,))
        worker.start()
        worker.join(1)
        assert not worker.is_alive()


@pytest.mark.parametrize(("kind", "copied"), [("mixture", True), ("slerp", False)])
def test_a_mixture_is_copied_as_a_stack_is(kind, copied, llamas, tmp_path, monkeypatch):
    """By threads that wait for the hash: computing its routers is next to nothing."""
    forked, spare = [], []
    real, sealer = processes.run, seal.Sealer

    def counted(*given):
        forked.append(len(given[0]))
        real(*given)

    def noted(*given):
        spare.append(sealer(*given)._spare)
        return sealer(*given)

    monkeypatch.setattr(processes, "run", counted)
    monkeypatch.setattr(engine, "Sealer", noted)
    monkeypatch.setattr(engine, "CHUNK", 1)  # enough work for two, however small the models
    moeforge.build(RECIPES[kind](*llamas[:2]), tmp_path / "out", threads=2, verify=False)
    assert (spare, not forked) == ([int(copied)], copied)


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


@pytest.fixture
def in_file(tmp_path):
    """A plan that adds up tensor x of model a, ones in a file, twice."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"x": torch.ones(3 * BLOCK, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    expr = Merge("linear", (A, A), (("weight", (1.0, 2.0)), ("normalize", False)))
    return plan_of(expr, [FolderSource("a", tmp_path)], shape=(3 * BLOCK,))


def test_a_file_that_was_cut_off_meanwhile_is_named(in_file, tmp_path):
    reader, data = Reader(in_file, pinned=False, settle=lambda: None), memoryview(bytearray(2048))
    reader.gather(A, [(1024, 512), (4096, 1536)], data)
    assert bytes(data) == b"\x80\x3f" * 1024, "ones in bfloat16"
    os.truncate(tmp_path / "model.safetensors", 2048)
    with pytest.raises(OSError, match="ended early while reading x"):
        reader.gather(A, [(4096, 2048)], data)


def test_files_that_a_worker_reads_are_closed_with_the_chunk(in_file, monkeypatch):
    opened, open_file = [], reading.open_file
    monkeypatch.setattr(
        reading, "open_file", lambda *to: opened.append(open_file(*to)) or opened[-1]
    )
    monkeypatch.setattr(kernels, "_loaded", True)
    working, kind, count = BY_NAME["float32"], BY_NAME["bfloat16"], 0
    worker, expr = Evaluator(in_file, BLOCK), in_file.tensors[0].expr
    for _, data in worker.produce(expr, working, kind, Whole(), 0, 3 * BLOCK):
        count += 1
        assert bytes(data) == b"\x40\x40" * BLOCK, "threes"
        assert len(opened) == 1, "once for all slices"
        os.fstat(opened[0])
    assert count == 3
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def test_memory_limit_makes_slices_smaller():
    plan = plan_of(LINEAR, [source("a", 1)[0], source("b", 2)[0]])
    generous = Settings(threads=2)
    tight = Settings(threads=2, memory=engine.peak_memory(plan, generous) - 1)
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


# --- worker processes ----------------------------------------------------------------------------

ROWS, WIDTH, RANK = 577, 521, 7
TENSORS = 4


def checkpoint(key, seed, kind=MemorySource):
    """A source of several tensors of some chunks each, and of an adapter to them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (RANK, WIDTH), "b": (ROWS, RANK)}
    shapes |= {f"x{i}": (ROWS, WIDTH) for i in range(TENSORS)}
    tensors = {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator).bfloat16()
        data = tensor.flatten().view(torch.uint8).numpy().tobytes()
        tensors[name] = (TensorSpec(BY_NAME["bfloat16"], shape), data)
    return kind(key, tensors)


def several(make, kinds=(MemorySource,) * 3, rows=ROWS):
    """A plan of tensors y0, y1, … whose expressions are `make(i)`, of sources 0, 1, 2."""
    sources = {str(i): checkpoint(str(i), i, kind) for i, kind in enumerate(kinds)}
    spec = TensorSpec(BY_NAME["bfloat16"], (rows, WIDTH))
    tensors = tuple(PlannedTensor(f"y{i}", spec, make(i)) for i in range(TENSORS))
    return Plan("merge", tensors, {}, sources, sources["0"])


@pytest.fixture
def workers(monkeypatch):
    """Make tensors of the size here large; return the numbers of processes that builds used."""
    monkeypatch.setattr(slices, "CHUNK", 2**17)
    monkeypatch.setattr(engine, "CHUNK", 2**17)
    monkeypatch.setattr(_select, "SMALL", 2**12)
    used, real = [], processes.run

    def spy(work, make_state, count, *others):
        used.append(count)
        real(work, make_state, count, *others)

    monkeypatch.setattr(processes, "run", spy)
    return used


def reads(i):
    return tuple(Read(key, f"x{i}") for key in "012")


def task(word, i, **params):
    params = {"weight": (None, 1.0, 0.5), "rescale": True, "normalize": False, **params}
    return Merge(word, reads(i), tuple({**params, "lambda": 1.0}.items()))


def lora(i):
    return Lora(Read("0", f"x{i}"), Read("1", "a"), Read("1", "b"), 0.3)


def gather(i):
    """Rows of two inputs in some order, zeros, means, and padding with the mean of all."""
    order = np.arange(ROWS - 9) * 7 % ROWS
    source = np.where(order % 3 == 0, 1, 0)
    source[5], source[6:8] = RowTable.ZERO, RowTable.MEAN
    order[6:8] = (0, 1)
    means = (((0, 1), (1, 2)), ((1, 5), (0, 5), (0, 6)))
    return Gather((lora(i), Read("2", f"x{i}")), RowTable(source, order, means, padding=9))


def nested(i):
    trimmed = task("ties", i, density=(None, 0.3, 1.0))
    rotated = Merge("slerp", (trimmed, Read("1", f"x{i}")), (("t", 0.4),))
    params = {"filter_wise": False}.items()
    return Merge("model_stock", (rotated, trimmed, lora(i), Read("2", f"x{i}")), tuple(params))


NUSLERP = {"weight": (None, 0.3, 0.7), "nuslerp_flatten": False}
PLANS = {
    "ties": lambda i: task("ties", i, density=(None, 0.3, 0.55)),
    "della": lambda i: task("della", i, density=(None, 0.3, 0.5), epsilon=(None, 0.2, 0.1), key=i),
    "nuslerp of rows": lambda i: Merge(
        "nuslerp", reads(i), tuple({**NUSLERP, "nuslerp_row_wise": False}.items())
    ),
    "nuslerp of columns": lambda i: Merge(
        "nuslerp", reads(i), tuple({**NUSLERP, "nuslerp_row_wise": True}.items())
    ),
    "arcee_fusion": lambda i: Merge("arcee_fusion", reads(i)[:2]),
    "nested": nested,
    "gather": gather,
    "lora": lora,
}


def built(plan, folder, **settings):
    folder.mkdir()
    engine.run(plan, lay_out(plan.tensors), folder, Settings(**settings))
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", PLANS)
def test_bytes_do_not_depend_on_processes_threads_or_slices(kind, workers, tmp_path, monkeypatch):
    plan = several(PLANS[kind])
    first = built(plan, tmp_path / "one", threads=1, slice_elements=2**16)
    assert not workers, "one worker needs no process"
    for threads, size in ((2, 2**16), (4, 2**18)):
        other = built(plan, tmp_path / f"{threads}", threads=threads, slice_elements=size)
        assert other == first
    assert workers == [2, 4]
    if not engine.multiplies(plan):  # see tiny.in_a_child
        monkeypatch.setattr(processes, "AVAILABLE", False)
        before = threading.active_count()
        assert built(plan, tmp_path / "threads", threads=3, slice_elements=2**17) == first
        assert len(workers) == 2
        assert threading.active_count() == before


def no_threads(*_):
    raise NotImplementedError


@pytest.mark.parametrize(("kind", "forks"), [("ties", True), ("lora", False), ("nested", False)])
def test_after_threads_that_multiply_nothing_is_forked_that_does(
    kind, forks, workers, tmp_path, monkeypatch
):
    monkeypatch.setattr(engine.threads, "multiplied", True)
    monkeypatch.setattr(engine.Pool, "run", no_threads)
    parts = several(PLANS[kind])
    with nullcontext() if forks else pytest.raises(NotImplementedError):
        engine.run(parts, lay_out(parts.tensors), tmp_path, Settings(threads=2))
    assert bool(workers) is forks


class Recording(MemorySource):
    """Writes down which process reads."""

    folder_of_pids: Path

    def read(self, name, start, out):
        (self.folder_of_pids / str(os.getpid())).touch()
        super().read(name, start, out)


def test_work_is_done_by_other_processes(workers, tmp_path):
    Recording.folder_of_pids = tmp_path / "pids"
    Recording.folder_of_pids.mkdir()
    plan = several(PLANS["lora"], (Recording, Recording, MemorySource))
    built(plan, tmp_path / "out", threads=2, slice_elements=2**16)
    pids = {int(file.name) for file in Recording.folder_of_pids.iterdir()}
    assert pids
    assert os.getpid() not in pids


class Raising(MemorySource):
    def read(self, name, start, out):
        if name == "x2" and start:
            raise OSError("the disk is gone")
        super().read(name, start, out)


class Killing(MemorySource):
    """Ends its worker as the kernel does when memory runs out; never the test itself."""

    tests = os.getpid()

    def read(self, name, start, out):
        if name == "x2" and os.getpid() != self.tests:
            os.kill(os.getpid(), signal.SIGKILL)
        super().read(name, start, out)


@pytest.mark.parametrize(
    ("kind", "said"),
    [(Raising, r"^y2: the disk is gone"), (Killing, r"a worker process was ended by SIGKILL")],
)
def test_a_worker_that_fails_ends_the_build(kind, said, workers, tmp_path):
    plan = several(PLANS["ties"], (MemorySource, kind, MemorySource))
    with pytest.raises(moeforge.errors.BuildError, match=said):
        built(plan, tmp_path / "out", threads=3, slice_elements=2**16)
    assert workers == [3]
    assert not multiprocessing.active_children()


SLOW = """
import signal, sys, time
from moeforge import engine
from moeforge.cli import app
from moeforge.sources.folder import FolderSource

signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests inherited
engine.CHUNK = 1  # tiny models get workers too
read = FolderSource.read

def slowly(self, name, start, out):
    time.sleep(0.3)
    read(self, name, start, out)

FolderSource.read = slowly
app(sys.argv[1:])
"""


def children(pid):
    """Processes that `pid` started and that run."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def runs(pid):
    """Say whether a process is there and is not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def leaves_ctrl_c_to_its_parent(pid):
    """Say whether process `pid` ignores SIGINT, as a worker does once it has begun."""
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigIgn"))
    return bool(int(mask, 16) >> signal.SIGINT - 1 & 1)


def wait_for(what, seconds):
    """Wait until `what()` is true, and say whether it came to be so in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.02)
    return False


@pytest.fixture
def slow_build(llamas, tmp_path):
    """A build by the command line, in the middle of its work: the process and its workers."""
    recipe = tmp_path / "recipe.yml"
    one, other = llamas[:2]
    models = f"[{{model: {one}}}, {{model: {other}}}]"
    recipe.write_text(
        f"merge_method: slerp\nbase_model: {one}\nmodels: {models}\nparameters: {{t: 0.3}}\n"
    )
    command = [sys.executable, "-c", SLOW, "build", str(recipe), "-o", str(tmp_path / "out")]
    build = subprocess.Popen(
        [*command, "--threads", "3"], stderr=subprocess.PIPE, start_new_session=True, text=True
    )
    try:
        yield build, wait_for(lambda: len(children(build.pid)) == 3 and children(build.pid), 60)
    finally:
        if build.poll() is None:
            build.kill()
        build.communicate()


linux = pytest.mark.skipif(not processes.AVAILABLE, reason="workers are threads here")


@linux
def test_a_killed_build_leaves_no_workers_and_no_output(slow_build, llamas, tmp_path):
    build, workers = slow_build
    assert len(workers) == 3
    build.kill()
    build.wait()
    assert wait_for(lambda: not any(map(runs, workers)), 5)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.moeforge").exists()
    forge.build(tmp_path / "recipe.yml", tmp_path / "out")
    assert not (tmp_path / ".out.moeforge").exists(), "the next build clears it"


@linux
def test_ctrl_c_ends_everything(slow_build, tmp_path):
    build, workers = slow_build
    assert len(workers) == 3
    assert wait_for(lambda: all(map(leaves_ctrl_c_to_its_parent, workers)), 5)
    os.killpg(build.pid, signal.SIGINT)
    _, said = build.communicate(timeout=5)
    assert build.returncode == 130
    assert "stopped; nothing was published" in said
    assert "Traceback" not in said
    assert not any(map(runs, workers))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yml"]


class Slow:
    """A job that takes a moment."""

    name, size = "slow", 1

    def chunks(self):
        yield lambda worker, report: time.sleep(0.05)

    def advance(self):
        return False


def test_every_job_is_told_though_workers_end_while_some_are():
    """Whoever is told may take long: the workers may have done the rest and ended meanwhile."""
    jobs, told = [Slow() for _ in range(6)], []

    def complete(job):
        told.append(job)
        time.sleep(0.5)

    engine.processes.run(jobs, lambda: None, 2, lambda done: None, complete=complete)
    assert len(told) == 6

"""Expressions of weight transforms: equal to torch's own words for them, however they are run."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moeforge import engine, methods
from moeforge.engine import (
    CopyJob,
    MergeJob,
    Settings,
    evaluate,
    jobs,
    reading,
    reshape,
    rows,
    slices,
)
from moeforge.methods import _sums
from moeforge.output.layout import lay_out
from moeforge.plans import (
    Affine,
    Columns,
    Concat,
    Fill,
    Gather,
    Lora,
    Merge,
    Plan,
    PlannedTensor,
    Read,
    Rows,
    RowTable,
    Transpose,
    dump,
)
from moeforge.sources.folder import FolderSource
from moeforge.sources.memory import MemorySource
from moeforge.tensors import BY_NAME, TensorSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((1, 1), (1, 9), (9, 1), (7, 5), (130, 67), (3, 700), (700, 3))
HALVES = (("weight", (0.5, 0.25)), ("normalize", False))
"""Powers of two: products are exact, and there is one rounding whatever the order."""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Make a few thousand elements many chunks, bands, blocks and windows."""
    for module, name, value in (
        (engine, "CHUNK", 2**11),
        (slices, "CHUNK", 2**11),
        (reshape, "BAND", 2**11),
        (reshape, "BLOCK", 2**8),
        (rows, "BLOCK", 2**8),
        (slices, "BLOCK", 2**8),
        (_sums, "BLOCK", 2**8),
        (reading, "WINDOW", 2**10),
    ):
        monkeypatch.setattr(module, name, value)
    # Not the block that it asks for: methods that are first loaded meanwhile would keep that.
    group = property(lambda place: max(1, 2**8 // place.row) * place.row)
    monkeypatch.setattr(methods.Place, "group", group)


def spec_of(tensor):
    return TensorSpec(BY_NAME[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))


def in_memory(key, tensors):
    data = {
        name: (spec_of(tensor), tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }
    return MemorySource(key, data)


def in_files(key, tensors, folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    return FolderSource(key, folder)


def tensors_of(seed, shape, dtype):
    """A matrix "x", one beside it "y", a vector "v", an adapter "a", "b" of rank 3."""
    generator = torch.Generator().manual_seed(seed)
    height, width = shape
    shapes = {"x": shape, "y": (height, 4), "v": (height,), "a": (3, width), "b": (height, 3)}
    return {k: torch.randn(s, generator=generator).to(dtype) for k, s in shapes.items()}


def plan_of(expr, like, sources):
    """A plan of two equal tensors, so that there is work for two; they share their expression."""
    return plan_of_all({"out": (expr, like)}, sources)


def plan_of_all(wanted, sources):
    """Such a plan of several expressions, each with the tensor that it is, by name."""
    tensors = tuple(
        PlannedTensor(before + name, spec_of(like), expr)
        for before in ("", "again ")
        for name, (expr, like) in wanted.items()
    )
    return Plan("merge", tensors, {}, {source.key: source for source in sources}, sources[0])


WAYS = ((1, 2**8), (1, 2**10), (1, 2**13), (2, 2**8), (2, 2**12))
"""Workers and elements per slice."""


def made(plan, folder, ways=WAYS):
    """Build `plan` in several ways; return its tensor, which must be the same in all of them."""
    return all_made(plan, folder, ways)["out"]


def all_made(plan, folder, ways=WAYS):
    """Do so with all its tensors, by name; each must be there twice."""
    files = []
    for number, (threads, size) in enumerate(ways):
        (folder / str(number)).mkdir(parents=True)
        settings = Settings(threads=threads, slice_elements=size)
        engine.run(plan, lay_out(plan.tensors), folder / str(number), settings)
        files.append(folder / str(number) / "model.safetensors")
    assert len({file.read_bytes() for file in files}) == 1, "the bytes depend on how it was run"
    result = load_file(files[0])
    tensors = {name: result[name] for name in result if not name.startswith("again ")}
    assert len(result) == 2 * len(tensors) == len(plan.tensors)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, result[f"again {name}"]), name
    return tensors


def shuffled(count, seed=0):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def permutation(order):
    return RowTable(np.zeros(len(order), dtype=np.int64), np.asarray(order))


X, Y, V, X2 = Read("0", "x"), Read("0", "y"), Read("0", "v"), Read("1", "x")
MEAN = Merge("linear", (X, X2), HALVES)
LORA = Lora(X, Read("0", "a"), Read("0", "b"), 0.5)
ROW_WISE = Merge(
    "nuslerp",
    (X, X2),
    (("weight", (0.3, 0.7)), ("nuslerp_flatten", False), ("nuslerp_row_wise", False)),
)
"""For such methods a vector is one row."""
MEASURED = Merge("slerp", (X, X2), (("t", 0.25),))


def middle(tensor):
    """First row and number of rows of a part that is neither end where there is room."""
    height = tensor.shape[0]
    return min(1, height - 1), max(1, height - 2)


def part_of(expr, tensor):
    return Rows(expr, *middle(tensor))


def part(tensor):
    first, count = middle(tensor)
    return tensor[first : first + count]


def mean(t, o):
    return 0.5 * t["x"] + 0.25 * o["x"]


def beside(*tensors):
    """Side by side, with three columns of zeros."""
    return torch.cat((*tensors, torch.zeros(len(tensors[0]), 3)), 1)


def order_of(t):
    return shuffled(len(t["x"]))


# From the tensors of both sources, in the dtype of arithmetic: what to compute, and torch for it.
EXACT = {
    "rows": lambda t, o: (part_of(X, t["x"]), part(t["x"])),
    "rows of rows": lambda t, o: (part_of(part_of(X, t["x"]), part(t["x"])), part(part(t["x"]))),
    "rows of a vector": lambda t, o: (part_of(V, t["v"]), part(t["v"])),
    "rows of a merge": lambda t, o: (part_of(MEAN, t["x"]), part(mean(t, o))),
    "affine": lambda t, o: (Affine(X, 0.3, 1.0), t["x"] * 0.3 + 1.0),
    "affine rows": lambda t, o: (Affine(part_of(X, t["x"]), 0.3, -1.5), part(t["x"]) * 0.3 - 1.5),
    "affine merge": lambda t, o: (Affine(MEAN, -3.0), mean(t, o) * -3.0),
    "affine of a vector": lambda t, o: (Affine(V, shift=1.0), t["v"] + 1.0),
    "affine twice": lambda t, o: (
        Affine(Affine(X, 0.3, 1.0), 7.0, -0.1),
        (t["x"] * 0.3 + 1.0) * 7.0 - 0.1,
    ),
    "merge of affine": lambda t, o: (
        Merge("linear", (Affine(X, 0.3, 1.0), X2), HALVES),
        0.5 * (t["x"] * 0.3 + 1.0) + 0.25 * o["x"],
    ),
    "columns": lambda t, o: (
        Columns((X, Y), t["x"].shape[1] + 7),
        beside(t["x"], t["y"]),
    ),
    "columns of one": lambda t, o: (Columns((X,), t["x"].shape[1]), t["x"]),
    "columns of a read and a merge": lambda t, o: (
        Columns((Y, MEAN), t["x"].shape[1] + 7),
        beside(t["y"], mean(t, o)),
    ),
    "rows of columns": lambda t, o: (
        part_of(Columns((X, Y), t["x"].shape[1] + 7), t["x"]),
        part(beside(t["x"], t["y"])),
    ),
    "transpose": lambda t, o: (Transpose(X), t["x"].T),
    "transpose of a merge": lambda t, o: (Transpose(MEAN), mean(t, o).T),
    "transpose of a transpose": lambda t, o: (Transpose(Transpose(X)), t["x"]),
    "transpose of columns": lambda t, o: (
        Transpose(Columns((X, Y), t["x"].shape[1] + 7)),
        beside(t["x"], t["y"]).T,
    ),
    "rows of a transpose": lambda t, o: (part_of(Transpose(X), t["x"].T), part(t["x"].T)),
    "merge of transposes": lambda t, o: (
        Merge("linear", (Transpose(X), Transpose(X2)), HALVES),
        mean(t, o).T,
    ),
    "gather": lambda t, o: (Gather((X,), permutation(order_of(t))), t["x"][order_of(t)]),
    "gather of a vector": lambda t, o: (
        Gather((V,), permutation(order_of(t))),
        t["v"][order_of(t)],
    ),
    "gather of a transpose": lambda t, o: (
        Gather((Transpose(X),), permutation(shuffled(t["x"].shape[1]))),
        t["x"].T[shuffled(t["x"].shape[1])],
    ),
    "transpose of rows of two in turn": lambda t, o: (
        Transpose(
            Gather(
                (X, X2),
                RowTable(
                    np.arange(2 * len(t["x"])) % 2,
                    np.arange(2 * len(t["x"])) // 2,
                ),
            )
        ),
        torch.stack((t["x"], o["x"]), 1).flatten(0, 1).T,
    ),
}


def working(dtype):
    return torch.promote_types(dtype, torch.float32)


def sources(shape, dtype, folder=None):
    both = [tensors_of(seed, shape, dtype) for seed in (1, 2)]
    if folder is None:
        found = [in_memory(str(i), tensors) for i, tensors in enumerate(both)]
    else:
        found = [in_files(str(i), t, folder / f"in{i}") for i, t in enumerate(both)]
    wide = [{k: v.to(working(dtype)) for k, v in tensors.items()} for tensors in both]
    return found, wide


def worked_out(cases, tensors, dtype):
    """Return each case's expression, and what it is to give in `dtype`, by name."""
    made = ((name, words(*tensors)) for name, words in cases.items())
    return {name: (expr, expected.to(dtype)) for name, (expr, expected) in made}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_to_torch(shape, dtype, tmp_path):
    """All in one plan, for a build in each way costs more than what is in it."""
    found, tensors = sources(shape, dtype)
    wanted = worked_out(EXACT, tensors, dtype)
    plan = plan_of_all(wanted, found)
    for expr, expected in wanted.values():
        assert plan.shape(expr) == tuple(expected.shape)
    result = all_made(plan, tmp_path, WAYS if shape[0] > 9 else WAYS[::2])
    for name, (_, expected) in wanted.items():
        assert torch.equal(result[name], expected), name


@pytest.mark.parametrize("name", EXACT)
def test_stored_in_another_dtype_it_is_rounded_once(name, tmp_path):
    """Each in a plan of its own, which allocates for it alone."""
    found, tensors = sources((130, 67), torch.float32)
    expr, expected = EXACT[name](*tensors)
    result = made(plan_of(expr, expected.bfloat16(), found), tmp_path)
    assert torch.equal(result, expected.bfloat16())


def adapted(t):
    return t["x"].double() + 0.5 * t["b"].double() @ t["a"].double()


def arc(a, b, t):
    """nuslerp and slerp along the last dimension, in float64."""
    a, b = a.double(), b.double()
    angle = torch.nn.functional.cosine_similarity(a, b, dim=-1).acos().unsqueeze(-1)
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()


def flat_arc(t, o):
    return arc(t["x"].flatten(), o["x"].flatten(), 0.25).view(t["x"].shape)


CLOSE = {
    "rows of an adapter": lambda t, o: (part_of(LORA, t["x"]), part(adapted(t))),
    "affine adapter": lambda t, o: (Affine(LORA, 0.3, 1.0), adapted(t) * 0.3 + 1.0),
    "columns of an adapter": lambda t, o: (
        Columns((Y, LORA), t["x"].shape[1] + 4),
        torch.cat((t["y"].double(), adapted(t)), 1),
    ),
    "transpose of an adapter": lambda t, o: (Transpose(LORA), adapted(t).T),
    "gather of an adapter": lambda t, o: (
        Gather((LORA,), permutation(order_of(t))),
        adapted(t)[order_of(t)],
    ),
    "rows of a row-wise merge": lambda t, o: (
        part_of(ROW_WISE, t["x"]),
        part(arc(t["x"], o["x"], 0.7)),
    ),
    "transpose of a row-wise merge": lambda t, o: (
        Transpose(ROW_WISE),
        arc(t["x"], o["x"], 0.7).T,
    ),
    "columns of a row-wise merge": lambda t, o: (
        Columns((ROW_WISE, Y), t["x"].shape[1] + 4),
        torch.cat((arc(t["x"], o["x"], 0.7), t["y"].double()), 1),
    ),
    "row-wise merge of transposes": lambda t, o: (
        Merge("nuslerp", (Transpose(X), Transpose(X2)), ROW_WISE.params),
        arc(t["x"].T, o["x"].T, 0.7),
    ),
    "rows of a measured merge": lambda t, o: (part_of(MEASURED, t["x"]), part(flat_arc(t, o))),
    "transpose of a measured merge": lambda t, o: (Transpose(MEASURED), flat_arc(t, o).T),
    "measured merge of transposes": lambda t, o: (
        Merge("slerp", (Transpose(X), Transpose(X2)), MEASURED.params),
        flat_arc(t, o).T,
    ),
    "rows of a row-wise merge of vectors": lambda t, o: (
        part_of(Merge("nuslerp", (V, Read("1", "v")), ROW_WISE.params), t["v"]),
        part(arc(t["v"], o["v"], 0.7)),
    ),
    "gather of a row-wise merge of vectors": lambda t, o: (
        Gather((Merge("nuslerp", (V, Read("1", "v")), ROW_WISE.params),), permutation(order_of(t))),
        arc(t["v"], o["v"], 0.7)[order_of(t)],
    ),
}


NEAR = {torch.float32: 2e-6, torch.float64: 1e-13}


def near(result, expected):
    tolerance = NEAR[result.dtype]
    return torch.allclose(result.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("shape", [(7, 5), (130, 67), (3, 700)], ids=str)
def test_what_is_computed_in_whole_rows(shape, dtype, tmp_path):
    found, tensors = sources(shape, dtype)
    wanted = worked_out(CLOSE, tensors, dtype)
    result = all_made(plan_of_all(wanted, found), tmp_path)
    for name, (_, expected) in wanted.items():
        assert near(result[name], expected), name


@pytest.mark.parametrize("name", CLOSE)
def test_what_is_computed_in_whole_rows_alone(name, tmp_path):
    """In a plan of its own, which allocates for it alone."""
    found, tensors = sources((130, 67), torch.float32)
    expr, expected = CLOSE[name](*tensors)
    assert near(made(plan_of(expr, expected.float(), found), tmp_path), expected.float())


def test_two_workers_are_two_processes(tmp_path, monkeypatch):
    used, real = [], engine.processes.run

    def spy(work, make_state, count, *more):
        used.append(count)
        real(work, make_state, count, *more)

    monkeypatch.setattr(engine.processes, "run", spy)
    found, tensors = sources((130, 67), torch.bfloat16)
    plan = plan_of(Transpose(MEAN), mean(*tensors).T.bfloat16(), found)
    first = made(plan, tmp_path / "processes")
    assert used == [2, 2]
    monkeypatch.setattr(engine.processes, "AVAILABLE", False)
    assert torch.equal(made(plan, tmp_path / "threads"), first)
    assert used == [2, 2]


# --- copies --------------------------------------------------------------------------------------


def jobs_of(plan):
    return jobs.jobs_of(plan, lay_out(plan.tensors), None)


@pytest.mark.parametrize("name", ["rows", "rows of rows", "rows of a vector"])
def test_rows_of_a_file_are_a_byte_range_of_it(name, tmp_path):
    found, tensors = sources((130, 67), torch.bfloat16, tmp_path)
    expr, expected = EXACT[name](*tensors)
    plan = plan_of(expr, expected.bfloat16(), found)
    assert plan.bytes_copied == plan.bytes_read == plan.nbytes == 2 * 2 * expected.numel()
    assert engine.is_copy_only(plan)
    assert all(isinstance(job, CopyJob) for job in jobs_of(plan))
    assert torch.equal(made(plan, tmp_path / "out"), expected.bfloat16())


def test_rows_that_are_not_stored_so_are_computed(tmp_path):
    found, tensors = sources((130, 67), torch.float32, tmp_path)
    expr, expected = EXACT["rows"](*tensors)
    rounded = plan_of(expr, expected.bfloat16(), found)
    assert not rounded.bytes_copied
    assert rounded.bytes_read == 2 * 4 * expected.numel()
    assert all(isinstance(job, MergeJob) for job in jobs_of(rounded))
    no_file = plan_of(expr, expected, sources((130, 67), torch.float32)[0])
    assert all(isinstance(job, MergeJob) for job in jobs_of(no_file))


def test_rows_are_counted_as_what_is_read_of_them():
    (one, two), tensors = sources((8, 5), torch.float32)
    for expr, bytes_read in (
        (Rows(MEAN, 2, 3), 2 * 3 * 5 * 4),
        (Affine(Rows(X, 2, 3), 2.0), 3 * 5 * 4),
        (Rows(Columns((X, Y), 9), 1, 2), 2 * 9 * 4),
        (Rows(Transpose(X), 1, 2), 8 * 5 * 4),
        (Columns((X, Rows(X2, 0, 8)), 10), 2 * 8 * 5 * 4),
    ):
        assert plan_of(expr, tensors[0]["x"], [one, two]).bytes_read == 2 * bytes_read


def test_integers_are_never_computed(tmp_path):
    big = torch.arange(24).view(8, 3) + 2**60
    plan = plan_of(Rows(X, 2, 5), big[2:7], [in_memory("0", {"x": big})])
    assert torch.equal(made(plan, tmp_path), big[2:7])


@pytest.mark.parametrize("expr", [Rows(X, 6, 3), Rows(X, -1, 3), Columns((X, Y), 8)], ids=dump)
def test_what_lies_outside_is_no_plan(expr):
    found, tensors = sources((8, 5), torch.float32)
    with pytest.raises(AssertionError, match="planners"):
        plan_of(expr, tensors[0]["x"], found).shape(expr)


# --- pieces --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["memory", "files"])
def test_a_tensor_of_pieces_of_every_kind(where, tmp_path):
    shape = (60, 40)
    found, (t, o) = sources(shape, torch.bfloat16, tmp_path if where == "files" else None)
    pieces = (
        (Rows(X, 7, 50), t["x"][7:57]),
        (Fill(0.0), torch.zeros(11, 40)),
        (
            Columns((Rows(X2, 2, 44), Rows(X, 3, 44)), 80),
            torch.cat((o["x"][2:46], t["x"][3:47]), 1),
        ),
        (Affine(X, 1.0, 1.0), t["x"] + 1.0),
        (Transpose(Rows(MEAN, 0, 40)), mean(t, o)[:40].T),
        (Columns((Y,), 40), torch.cat((t["y"], torch.zeros(60, 36)), 1)),
        (Gather((X2,), permutation(order_of(t))), o["x"][order_of(t)]),
        (X, t["x"]),
    )
    expected = torch.cat([tensor.flatten() for _, tensor in pieces]).view(-1, 40).bfloat16()
    concat = Concat(tuple((expr, spec_of(tensor.bfloat16())) for expr, tensor in pieces))
    plan = plan_of(concat, expected, found)
    assert torch.equal(made(plan, tmp_path / "out"), expected)
    assert plan.bytes_copied == 2 * 2 * (50 * 40 + 60 * 40)


# --- rows in another order -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2**16,), (2**10, 2**6)], ids=str)
def test_rows_in_another_order_keep_every_bit(dtype, shape, tmp_path):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = torch.where(every.isfinite(), every, torch.zeros_like(every)).view(shape)
    order = shuffled(shape[0])
    expr = Gather((X,), permutation(order))
    result = made(plan_of(expr, every, [in_memory("0", {"x": every})]), tmp_path, WAYS[::4])
    assert torch.equal(result.view(torch.int16), every[order].view(torch.int16))


def test_affine_keeps_the_sign_of_zeros(tmp_path):
    zeros = torch.tensor([0.0, -0.0, 1.0])
    result = made(plan_of(Affine(X), zeros, [in_memory("0", {"x": zeros})]), tmp_path)
    assert result.signbit().tolist() == [False, True, False]


# --- memory --------------------------------------------------------------------------------------

ALONE = """
import sys
from pathlib import Path

import torch
from moeforge import engine
from moeforge.engine import Settings, evaluate
from moeforge.output.layout import lay_out
from moeforge.plans import Merge, Plan, PlannedTensor, Read, Transpose
from moeforge.sources.folder import FolderSource
from moeforge.tensors import BY_NAME, TensorSpec

def peak():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

folder = Path(sys.argv[1])
source = FolderSource("0", folder)
x = Read("0", "x")
expr = Transpose(Merge("linear", (x, x), (("weight", (0.5, 0.5)), ("normalize", False))))
height, width = source.specs()["x"].shape
spec = TensorSpec(BY_NAME["bfloat16"], (width, height))
plan = Plan("merge", (PlannedTensor("out", spec, expr),), {}, {"0": source}, source)
settings = Settings(threads=1)
before = peak()
engine.run(plan, lay_out(plan.tensors), folder / "out", settings)
print(before, peak(), engine.peak_memory(plan, settings))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells the peak there")
def test_a_transposed_matrix_is_not_held(tmp_path):
    matrix = torch.zeros(10_000, 6_000, dtype=torch.bfloat16)
    matrix[:, 17], matrix[4321] = 2.0, 3.0
    in_files("0", {"x": matrix}, tmp_path / "in")
    (tmp_path / "in" / "out").mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(engine.__file__).parents[2])
    said = subprocess.check_output(
        [sys.executable, "-c", ALONE, str(tmp_path / "in")], env=environment, text=True
    )
    before, peak, estimate = map(int, said.split())
    assert peak - before < estimate - engine.INTERPRETER < matrix.numel()
    assert peak < estimate
    result = load_file(tmp_path / "in" / "out" / "model.safetensors")["out"]
    assert torch.equal(result, matrix.T)


def test_bands_are_held_for_one_tensor_only():
    found, tensors = sources((130, 67), torch.float32)
    expr = Transpose(MEAN)
    worker = evaluate.Evaluator(plan_of(expr, tensors[0]["x"].T, found), 2**8)
    float32 = BY_NAME["float32"]
    for _ in worker.produce(expr, float32, float32, rows.Whole(), 0, 67 * 130):
        assert len(worker.bands) == 1
    worker.begin(X)
    assert not worker.bands


def test_the_estimate_knows_what_is_held():
    found, tensors = sources((130, 67), torch.bfloat16)

    def peak(expr):
        return engine.peak_memory(plan_of(expr, tensors[0]["x"].half(), found), Settings(threads=1))

    assert peak(Affine(X)) < peak(Affine(MEAN)) < peak(Affine(Merge("linear", (MEAN, MEAN, X))))
    assert peak(X) < peak(Columns((X, Y), 80))
    assert peak(Transpose(X)) - peak(X) == 8 * (130 * 67 + 2**16)

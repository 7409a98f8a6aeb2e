"""Every merge method, run by the real engine, against an independent formula in float64.

The formulas are written on whole tensors from the papers and from what mergekit 0.1.5 does
(docs/mergekit.md): full sorts and loops, nothing of moeforge.
"""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_random import key_of, uniform16

from moeforge import catalog, engine, methods
from moeforge.engine import Settings, pool
from moeforge.output.layout import lay_out
from moeforge.plans import Merge, Plan, PlannedTensor, Read
from moeforge.sources.memory import MemorySource
from moeforge.tensors import BY_NAME, TensorSpec

# --- running a method ----------------------------------------------------------------------------


def merge(word, inputs, dtype=torch.float64, **params):
    """Return the merge of `inputs` by the engine, from checkpoints of `dtype` to one of it."""
    name = str(dtype).removeprefix("torch.")
    spec = TensorSpec(BY_NAME[name], tuple(inputs[0].shape))
    sources = {
        str(i): MemorySource(
            str(i), {"x": (spec, tensor.to(dtype).flatten().view(torch.uint8).numpy().tobytes())}
        )
        for i, tensor in enumerate(inputs)
    }
    expr = Merge(word, tuple(Read(key, "x") for key in sources), tuple(params.items()))
    plan = Plan("merge", (PlannedTensor("y", spec, expr),), {}, sources, sources["0"])
    with TemporaryDirectory() as folder:
        engine.run(plan, lay_out(plan.tensors), Path(folder), Settings(1, 2**16))
        return load_file(f"{folder}/model.safetensors")["y"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Look for the end of a build at once: there are a thousand of them here."""
    monkeypatch.setattr(pool, "_POLL", 0.001)


def tensors(count, shape, seed=0, similar=False, bits=16):
    """Random tensors in float64 on a grid of 2^-bits, so that float32 holds their differences."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return (noise * 2**bits).round() / 2**bits

    base = draw(1.0)
    return [base + draw(0.04) for _ in range(count)] if similar else [draw(1) for _ in range(count)]


# --- formulas ------------------------------------------------------------------------------------


def lines(x):
    """The rows of a tensor along its last dimension; a vector is one."""
    return x.reshape(-1, x.shape[-1] if x.dim() else 1)


def linear(xs, p):
    total = sum(w * x for w, x in zip(p["weight"], xs, strict=True))
    return total / sum(p["weight"]) if p["normalize"] else total


def passthrough(xs, p):
    return p["scale"][0] * xs[0]


def rotated(a, b, t):
    """From vector a towards b, with sin((1−t)θ) by the addition theorem; straight if nearly parallel."""
    cosine = max(
        -1.0, min(1.0, float(a @ b) / max(float(a.norm()), 1e-7) / max(float(b.norm()), 1e-7))
    )
    if 1 - abs(cosine) < 2**-25:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    on_b = math.sin(t * angle) / math.sin(angle)
    return (math.cos(t * angle) - on_b * math.cos(angle)) * a + on_b * b


def slerp(xs, p):
    a, b = (x.flatten() for x in xs)
    long = float(a.norm()) > 1e-8 and float(b.norm()) > 1e-8
    if long and abs(float(a @ b / a.norm() / b.norm())) > 0.9995:
        return ((1 - p["t"]) * a + p["t"] * b).view_as(xs[0])
    return rotated(a, b, p["t"]).view_as(xs[0])


def nuslerp(xs, p):
    base = xs[0] if p["weight"][0] is None else torch.zeros_like(xs[0])
    (a, b), (first, second) = [x - base for x in xs[-2:]], p["weight"][-2:]
    t = second / (first + second) if abs(first + second) >= 1e-6 else 0.5
    if p["nuslerp_flatten"]:
        return base + rotated(a.flatten(), b.flatten(), t).view_as(a)
    turned = p["nuslerp_row_wise"] and a.dim() > 1
    a, b = (x.transpose(0, -1) if turned else x for x in (a, b))
    pairs = zip(lines(a), lines(b), strict=True)
    result = torch.stack([rotated(u, v, t) for u, v in pairs]).reshape(a.shape)
    return base + (result.transpose(0, -1) if turned else result)


def multislerp(xs, p):
    weights = [w for w in p["weight"] if w is not None]
    base = xs[0] if p["weight"][0] is None else 0 * xs[0]
    if len(weights) == 1:
        return xs[-1]
    if p["normalize_weights"]:
        weights = [w / sum(weights) for w in weights]
    ys = [(x - base).flatten() for x in xs[-len(weights) :]]
    units = [y / (y.norm() + p["eps"]) for y in ys]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    if float(mean.norm()) < p["eps"]:
        return base + sum(w * y for w, y in zip(weights, ys, strict=True)).view_as(base)
    mean = mean / mean.norm()
    tangent = sum(w * (u - (u @ mean) * mean) for w, u in zip(weights, units, strict=True))
    step = tangent.norm() + p["eps"]
    length = sum(w * y.norm() for w, y in zip(weights, ys, strict=True))
    return base + (length * (mean * step.cos() + tangent * step.sin() / step)).view_as(base)


def karcher(xs, p):
    if len(xs) == 1:
        return xs[0]
    norms = [float(x.norm()) for x in xs]
    units = [(x / n).flatten() for x, n in zip(xs, norms, strict=True) if n > p["tol"]]
    if not units:
        return torch.zeros_like(xs[0])
    mean = sum(units) / len(units)
    mean = mean / mean.norm() if mean.norm() >= p["tol"] else units[0]
    for _ in range(p["max_iter"]):
        tangent = torch.zeros_like(mean)
        for u in units:
            cosine = max(-1.0, min(1.0, float(u @ mean)))
            angle = math.acos(cosine)
            if angle >= p["tol"]:
                tangent += (u - cosine * mean) * angle / math.sin(angle) / len(units)
        step = float(tangent.norm())
        if step < p["tol"]:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean = mean / mean.norm()
    return (sum(norms) / len(norms) * mean).view_as(xs[0])


def model_stock(xs, p):
    base, k = xs[0], len(xs) - 1
    moves = [lines(x - base) if p["filter_wise"] else (x - base).reshape(1, -1) for x in xs[1:]]
    rows = []
    for parts in zip(*moves, strict=True):
        cosines = [
            float(parts[i] @ parts[j]) / max(float(parts[i].norm() * parts[j].norm()), 1e-6)
            for i in range(k)
            for j in range(i)
        ]
        cosine = sum(max(-1.0, min(1.0, c)) for c in cosines) / len(cosines)
        divisor = 1 + (k - 1) * cosine
        rows.append((0.0 if abs(divisor) < 1e-6 else k * cosine / divisor) * sum(parts) / k)
    return base + torch.stack(rows).view_as(base)


def nearswap(xs, p):
    base, other = xs
    share = (p["t"] / (base - other).abs().clamp(min=1e-6)).clamp(0, 1)
    return share * other + (1 - share) * base


def arcee_fusion(xs, p):
    base, other = map(lines, xs)
    p_, q = (torch.softmax(x, -1) + 1e-8 for x in (other, base))
    importance = ((other - base).abs() * (p_ * (p_ / q).log()).sum(-1, keepdim=True)).flatten()
    ordered = importance.sort().values
    first, median, third = (ordered[int(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
    taken = importance >= median + 1.5 * (third - first)
    return torch.where(taken, other.flatten(), base.flatten()).view_as(xs[0])


def ranking(values):
    """Numbers of the elements from the largest to the smallest, equal ones by position."""
    return np.argsort(-values.numpy(), kind="stable")


def marked(chosen, shape):
    mask = torch.zeros(math.prod(shape), dtype=torch.float64)
    mask[torch.from_numpy(chosen.copy())] = 1
    return mask.reshape(shape)


def largest(i, delta, p):
    """TIES: the largest share `density`."""
    density = p["density"][i + 1]
    count = max(1, int(density * delta.numel())) if density > 0 else 0
    return marked(ranking(delta.flatten().abs())[:count], delta.shape)


def window(i, delta, p):
    """Breadcrumbs: ascending, what lies below the largest share gamma."""
    n = delta.numel()
    keep, top = int(p["density"][i + 1] * n), int(p["gamma"][i + 1] * n)
    low = max(0, n - keep - top)
    return marked(ranking(delta.flatten().abs())[::-1][low : low + keep], delta.shape)


def lottery(i, delta, p):
    """DARE: kept with probability `density`."""
    bound = round(p["density"][i + 1] * 2**16)
    drawn = uniform16(key_of(p["key"], i), delta.numel())
    return torch.from_numpy(drawn < bound).double().reshape(delta.shape)


def by_rank(i, delta, p):
    """DELLA: kept with probability from density − ε to density + ε by rank in the row."""
    density, epsilon = p["density"][i + 1], p["epsilon"][i + 1]
    if density <= 0:
        return torch.zeros_like(delta)
    drawn = uniform16(key_of(p["key"], i), delta.numel())
    rows = lines(delta).abs().float().numpy()
    rank = np.argsort(np.argsort(rows, axis=1, kind="stable"), axis=1, kind="stable")
    last = rows.shape[1] - 1
    share = density - epsilon + 2 * epsilon * rank / last if last else np.full(rows.shape, density)
    kept = drawn.reshape(rows.shape) < np.round(share * 2**16)
    return torch.from_numpy(kept).double().reshape(delta.shape)


def task(mask=None, consensus=False):
    """Task arithmetic with a sparsifier: Ilharco et al. 2022; signs as in Yadav et al. 2023."""

    def formula(xs, p):
        base, weights, parts = xs[0], p["weight"][1:], []
        for i, (x, weight) in enumerate(zip(xs[1:], weights, strict=True)):
            delta = x - base
            if mask and p["density"][i + 1] < 1:
                whole, delta = delta.abs().sum(), delta * mask(i, delta, p)
                if p["rescale"] and whole >= 1e-7 and delta.abs().sum() >= 1e-7:
                    delta = delta * whole / delta.abs().sum()
            parts.append(delta * weight)
        total, divisor = sum(parts), torch.full_like(base, sum(weights))
        if consensus:
            sign = torch.where(total >= 0, 1.0, -1.0).double()
            agree = [(part.sign() == sign).double() for part in parts]
            total = sum(part * yes for part, yes in zip(parts, agree, strict=True))
            divisor = sum(w * yes for w, yes in zip(weights, agree, strict=True))
        if p["normalize"]:
            total = total / torch.where(divisor.abs() < 1e-8, 1.0, divisor)
        return base + p["lambda"] * total

    return formula


def sce(xs, p):
    parts = torch.stack([x - xs[0] for x in xs[1:]])
    if p["select_topk"] < 1:
        spread = ((parts - parts.mean(0)) ** 2).mean(0).flatten()
        varying = int((spread != 0).sum())
        count = int(np.float32(varying) * np.float32(p["select_topk"]))
        parts = parts * marked(ranking(spread)[:count], xs[0].shape)
    energy = [float((part**2).mean()) for part in parts]
    if sum(energy) < 1e-6:
        energy = [1 / len(energy)] * len(energy)
    weights = [e / sum(energy) for e in energy]
    sign = torch.where(parts.sum(0) >= 0, 1.0, -1.0).double()
    agree = [w * (part.sign() == sign).double() for w, part in zip(weights, parts, strict=True)]
    total = sum(part * share for part, share in zip(parts, agree, strict=True))
    return xs[0] + total / sum(agree).clamp(min=1e-6)


def ram(xs, p, grow=lambda shared, unique: 1.0):
    moves = [torch.where((x - xs[0]).abs() > p["epsilon"], x - xs[0], 0.0) for x in xs[1:]]
    count = sum((move != 0).double() for move in moves)
    total = sum(torch.where(count > 1, move / count.clamp(min=1), 0.0) for move in moves)
    for move in moves:
        alone, shared = (move != 0) & (count == 1), (move != 0) & (count > 1)
        total = total + torch.where(alone, move * grow(int(shared.sum()), int(alone.sum())), 0.0)
    return xs[0] + total


def ramplus_tl(xs, p):
    def grow(shared, unique):
        return 1 + p["r"] * min(max(shared / max(unique, p["epsilon"]), 0.0), p["alpha"])

    return ram(xs, p, grow)


# --- cases ---------------------------------------------------------------------------------------

TASK = {"density": (None, 1.0, 1.0), "normalize": False, "rescale": False, "lambda": 1.0}
EQUAL = {"weight": (None, 1.0, 1.0)}


def tasks(*cases, **common):
    """Cases of the task family: a base and two models; two cases that all of it share."""
    shared = [
        {"weight": (None, 1.0, 0.5), "normalize": True, "lambda": 0.7},
        {"weight": (None, 1.0, -0.5), "normalize": True},
        {"weight": (None, 1.0, -1.0), "normalize": True, "density": (None, 0.5, 1.0)},
    ]
    return [{**TASK, **EQUAL, **common, **case} for case in (*cases, *shared)]


SPARSE = [
    {"density": (None, 0.3, 0.55)},
    {"density": (None, 0.3, 0.55), "rescale": True, "weight": (None, 0.6, 0.3)},
    {"density": (None, 0.0, 0.8), "rescale": True, "normalize": True},
    {"density": (None, 1.0, 1e-9), "lambda": -1.5},
]
BREAD = [
    {"density": (None, 0.6, 0.3), "gamma": (None, 0.1, 0.8)},
    {"density": (None, 0.6, 0.9), "gamma": (None, 0.0, 0.05), "rescale": True},
    {"density": (None, 0.0, 1e-9), "gamma": (None, 0.0, 1.0)},
]
RANKED = [
    {"density": (None, 0.3, 0.55), "epsilon": (None, 0.2, 0.4), "rescale": True},
    {"density": (None, 0.5, 0.5), "epsilon": (None, 0.0, 0.1), "normalize": True},
    {"density": (None, 0.0, 1.0), "epsilon": (None, 0.1, 0.9)},
]
DELLA = {"key": 8, "epsilon": (None, 0.1, 0.1)}
GAMMA = {"gamma": (None, 0.01, 0.01)}
NUSLERP = {"nuslerp_flatten": True, "nuslerp_row_wise": False}
BY_ROW = {"nuslerp_flatten": False}
BY_COLUMN = {"nuslerp_flatten": False, "nuslerp_row_wise": True}

CASES = {
    "arcee_fusion": (arcee_fusion, [{}]),
    "breadcrumbs": (task(window), tasks(*BREAD, **GAMMA)),
    "breadcrumbs_ties": (task(window, True), tasks(*BREAD, **GAMMA)),
    "dare_linear": (task(lottery), tasks(*SPARSE, key=5)),
    "dare_ties": (task(lottery, True), tasks(*SPARSE, key=6)),
    "della": (task(by_rank, True), tasks(*RANKED, **DELLA)),
    "della_linear": (task(by_rank), tasks(*RANKED, **DELLA)),
    "karcher": (
        karcher,
        [
            {"of": 3, "max_iter": 10, "tol": 1e-5},
            {"of": 4, "max_iter": 1, "tol": 1e-9},
            {"of": 2, "max_iter": 0, "tol": 1e-5},
            {"of": 1, "max_iter": 10, "tol": 1e-5},
        ],
    ),
    "linear": (
        linear,
        [
            {"weight": (1.0, 2.0, 0.5), "normalize": True},
            {"weight": (1.0, -0.7, 0.25), "normalize": False},
            {"weight": (3.0,), "normalize": True},
        ],
    ),
    "model_stock": (
        model_stock,
        [{"of": n, "filter_wise": wise} for n, wise in [(3, 0), (4, 0), (3, 1), (5, 1)]],
    ),
    "multislerp": (
        multislerp,
        [
            {"weight": (1.0, 2.0, 0.5), "normalize_weights": True, "eps": 1e-8},
            {"weight": (0.3, 0.9), "normalize_weights": False, "eps": 1e-3},
            {"weight": (None, 1.0, -0.4, 0.8), "normalize_weights": True, "eps": 1e-8},
            {"weight": (None, 0.3), "normalize_weights": False, "eps": 1e-8},
        ],
    ),
    "nearswap": (nearswap, [{"t": t} for t in (0.0, 0.01, 0.7, -1.0, 1e9)]),
    "nuslerp": (
        nuslerp,
        [
            {**NUSLERP, "weight": weight, **mode}
            for weight in ((0.3, 0.7), (None, 1.0, 0.2), (2.0, -0.5), (1.0, -1.0))
            for mode in ({}, BY_ROW, BY_COLUMN)
        ],
    ),
    "passthrough": (passthrough, [{"scale": (-1.5,)}, {"scale": (0.0,)}]),
    "ram": (ram, [{"of": n, "epsilon": e} for n, e in [(3, 0.25), (2, 0.0), (4, 0.03)]]),
    "ramplus_tl": (
        ramplus_tl,
        [
            {"of": 3, "epsilon": 0.05, "r": 0.5, "alpha": 3.0},
            {"of": 4, "epsilon": 1.0, "r": 0.1, "alpha": 0.2},
            {"of": 2, "epsilon": 1e-5, "r": 0.1, "alpha": 0.2},
        ],
    ),
    "sce": (
        sce,
        [{"of": 3, "select_topk": share} for share in (1.0, 0.6, 0.0)]
        + [{"of": 5, "select_topk": 0.29}, {"of": 2, "select_topk": 0.5}],
    ),
    "slerp": (slerp, [{"t": t} for t in (0.0, 0.3, 0.5, 1.0, 1.4, -0.2)]),
    "task_arithmetic": (task(), tasks({}, {"density": (None, 0.3, 0.3), "rescale": True})),
    "ties": (task(largest, True), tasks(*SPARSE)),
}
BITS = {"sce": 5}
"""Coarser grids, on which float32 holds the variances exactly: they decide what is selected."""


def count_of(params, word):
    """Number of inputs of a case: said by it, or as many as it has weights."""
    per_input = params.get("weight", params.get("scale"))
    return params.get("of") or (len(per_input) if per_input else methods.load(word).inputs[0])


def without_count(params):
    return {name: value for name, value in params.items() if name != "of"}


def every_case():
    return [
        pytest.param(word, formula, params, id=f"{word}-{number}")
        for word, (formula, cases) in CASES.items()
        for number, params in enumerate(cases)
    ]


def compare(word, formula, params, inputs):
    """Assert that float64 and float32 builds give what the formula gives."""
    params = without_count(params)
    expected = formula(inputs, params)
    assert expected.shape == inputs[0].shape
    scale = max(float(x.abs().max()) for x in (*inputs, expected))
    exact = merge(word, inputs, **params)
    assert exact.dtype == torch.float64
    assert float((exact - expected).abs().max()) <= 1e-12 * scale
    result = merge(word, inputs, torch.float32, **params)
    assert result.dtype == torch.float32
    assert float((result.double() - expected).abs().max()) <= 4e-6 * scale


def test_every_method_has_an_independent_formula():
    assert set(CASES) == set(catalog.names("methods"))


@pytest.mark.parametrize("similar", [False, True], ids=["far", "similar"])
@pytest.mark.parametrize(("word", "formula", "params"), every_case())
def test_agrees_with_an_independent_formula(word, formula, params, similar):
    """On two blocks and some, so that sums are put together and rows end within a block.

    The seed is one for which no element lies so near to a threshold that float32 decides.
    """
    inputs = tensors(count_of(params, word), (367, 211), 3, similar, BITS.get(word, 16))
    compare(word, formula, params, inputs)


ROWS = {"arcee_fusion", "della", "della_linear", "model_stock", "nuslerp"}
SHAPES = [(), (1,), (7,), (40_000,), (1, 5), (6, 1), (3, 4, 5), (5, 70_001), (2, 33, 1021)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("word", "formula", "params"), every_case())
def test_agrees_for_any_shape(word, formula, params, shape):
    if math.prod(shape) > 1000 and word not in ROWS:
        pytest.skip("only methods that know rows tell large shapes apart")
    compare(
        word, formula, params, tensors(count_of(params, word), shape, 2, bits=BITS.get(word, 16))
    )


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), (2, 0, 3)], ids=str)
@pytest.mark.parametrize(("word", "formula", "params"), every_case())
def test_empty_tensors_stay_empty(word, formula, params, shape):
    inputs = tensors(count_of(params, word), shape)
    assert merge(word, inputs, **without_count(params)).shape == shape

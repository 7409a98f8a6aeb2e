"""Every merge method, run by the real engine, against an independent formula in float64."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from formulas import (
    arcee_fusion,
    by_rank,
    karcher,
    largest,
    linear,
    lottery,
    model_stock,
    multislerp,
    nearswap,
    nuslerp,
    passthrough,
    ram,
    ramplus_tl,
    sce,
    slerp,
    task,
    window,
)
from safetensors.torch import load_file

import moeforge
from moeforge import catalog, engine, methods
from moeforge.engine import Settings, pool
from moeforge.errors import BuildError, show_path
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
SMALL = [(), (1,), (7,), (1, 5), (6, 1), (3, 4, 5)]
SHAPES = [*SMALL, (40_000,), (5, 14_001), (2, 70_001), (2, 33, 1021)]


def telling_shapes():
    """Every case with the shapes that it tells apart: large ones only where rows matter."""
    for case in every_case():
        word, _, params = case.values
        for shape in SHAPES:
            # An independent loop over so many columns takes seconds.
            slow = shape == (2, 70_001) and params.get("nuslerp_row_wise")
            if shape in SMALL or (word in ROWS and not slow):
                yield pytest.param(*case.values, shape, id=f"{case.id}-{shape}")


@pytest.mark.parametrize(("word", "formula", "params", "shape"), list(telling_shapes()))
def test_agrees_for_any_shape(word, formula, params, shape):
    compare(
        word, formula, params, tensors(count_of(params, word), shape, 2, bits=BITS.get(word, 16))
    )


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), (2, 0, 3)], ids=str)
@pytest.mark.parametrize(("word", "formula", "params"), every_case())
def test_empty_tensors_stay_empty(word, formula, params, shape):
    inputs = tensors(count_of(params, word), shape)
    assert merge(word, inputs, **without_count(params)).shape == shape


# --- corner cases: each has a defined result -----------------------------------------------------

PLAIN = {
    word: without_count(
        {**cases[0], **({"weight": (None, 1.0, 1.0)} if "density" in cases[0] else {})}
    )
    for word, (_, cases) in CASES.items()
} | {
    "passthrough": {"scale": (1.0,)},
    "slerp": {"t": 0.4},
    "nearswap": {"t": 0.1},
}
SHAPE = (37, 53)


def close(result, expected, tolerance=1e-6):
    return float((result.double() - expected).abs().max()) <= tolerance * float(
        expected.abs().max()
    )


def plain(word, inputs, dtype=torch.float32, **changes):
    return merge(word, inputs, dtype, **{**PLAIN[word], **changes})


@pytest.mark.parametrize("word", sorted(CASES))
def test_zero_tensors_give_zeros(word):
    zeros = [torch.zeros(SHAPE, dtype=torch.float64)] * count_of(CASES[word][1][0], word)
    result = plain(word, zeros)
    assert torch.equal(result, torch.zeros(SHAPE))


@pytest.mark.parametrize("word", sorted(CASES))
def test_identical_models_give_themselves(word):
    """Also where each is the base: all differences are zero, and all angles."""
    (one,) = tensors(1, SHAPE)
    assert close(plain(word, [one] * count_of(CASES[word][1][0], word)), one)


@pytest.mark.parametrize("zeros", [True, False], ids=["a zero base", "a base of ones"])
@pytest.mark.parametrize("word", [w for w in sorted(CASES) if methods.load(w).base == "required"])
def test_models_equal_to_each_other_but_not_to_the_base(word, zeros):
    formula, cases = CASES[word]
    base = torch.zeros(SHAPE, dtype=torch.float64) if zeros else torch.ones(SHAPE).double()
    other = tensors(1, SHAPE, bits=5)
    compare(word, formula, PLAIN[word], [base, *other * (count_of(cases[0], word) - 1)])


def test_slerp_of_a_zero_tensor_keeps_the_other_on_the_arc():
    zero, (other,) = torch.zeros(SHAPE, dtype=torch.float64), tensors(1, SHAPE)
    # θ = 90°: what remains is sin(t·90°) of the other, not t of it.
    assert close(merge("slerp", [zero, other], t=0.3), math.sin(0.3 * math.pi / 2) * other)
    assert close(merge("slerp", [other, zero], t=0.3), math.cos(0.3 * math.pi / 2) * other)
    params = {**NUSLERP, "weight": (1.0, 1.0)}
    for mode in ({}, BY_ROW, BY_COLUMN):
        result = merge("nuslerp", [zero, other], **{**params, **mode})
        assert close(result, math.sqrt(0.5) * other)


def test_opposite_tensors():
    (one,) = tensors(1, SHAPE)
    for dtype in (torch.float32, torch.float64):
        # Every arc between them is as short: straight, through zero.
        assert merge("slerp", [one, -one], dtype, t=0.5).abs().max() == 0
        assert close(merge("slerp", [one, -one], dtype, t=0.25), 0.5 * one)
        for mode in ({}, BY_ROW, BY_COLUMN):
            params = {**NUSLERP, **mode, "weight": (3.0, 1.0)}
            assert close(merge("nuslerp", [one, -one], dtype, **params), 0.5 * one)
        # The first at the mean length: nothing says which way to leave it.
        for factor in (1.0, 1 / 3, 3.7):
            result = merge("karcher", [one, -factor * one], dtype, max_iter=10, tol=1e-5)
            assert close(result, one * (1 + factor) / 2)


def test_multislerp_of_directions_that_cancel_out():
    (one,) = tensors(1, SHAPE)
    params = {"normalize_weights": False, "eps": 1e-8}
    assert close(merge("multislerp", [one, -2 * one], weight=(1.0, 1.0), **params), -one)
    with pytest.raises(BuildError, match=r"y: .*directions of the models cancel out"):
        merge("multislerp", [one, one, -one], weight=(0.25, 0.25, 0.5), **params)


def test_one_model_alone():
    base, one = tensors(2, SHAPE)
    assert torch.equal(plain("multislerp", [one], weight=(0.3,)), one.float())
    assert torch.equal(plain("multislerp", [base, one], weight=(None, 0.3)), one.float())
    assert torch.equal(plain("karcher", [one]), one.float())
    assert close(plain("linear", [one], weight=(0.2,)), one)
    assert close(plain("sce", [base, one], select_topk=1.0), one)
    assert close(plain("ram", [base, one], epsilon=0.0), one)
    for word in ("ties", "dare_ties", "della", "breadcrumbs_ties", "task_arithmetic"):
        params = {
            "weight": (None, 0.5),
            "density": (None, 1.0),
            "normalize": False,
            "rescale": False,
        }
        more = {
            name: value[:2] for name, value in PLAIN[word].items() if name in ("epsilon", "gamma")
        }
        result = plain(word, [base, one], **{**params, "lambda": 1.0, **more})
        assert close(result, (base + one) / 2), word


@pytest.mark.parametrize("word", [w for w in sorted(CASES) if "density" in PLAIN[w]])
def test_densities_zero_and_one(word):
    base, one = tensors(2, SHAPE)
    rest = {"weight": (None, 1.0), "normalize": False, "lambda": 1.0}
    rest |= {n: v[:2] for n, v in PLAIN[word].items() if n in ("epsilon", "gamma")}
    for rescale in (False, True):
        full = plain(word, [base, one], **rest, rescale=rescale, density=(None, 1.0))
        assert close(full, one)
        none = plain(word, [base, one], **rest, rescale=rescale, density=(None, 0.0))
        assert close(none, one if word == "task_arithmetic" else base)


def test_equal_magnitudes_are_told_apart_by_position():
    base, other = torch.zeros(1, 7).double(), torch.tensor([[1.0, -1, 2, 1, -1, 1, 0]]).double()
    params = {**TASK, "weight": (None, 1.0)}
    kept = merge("ties", [base, other], **{**params, "density": (None, 0.5)})
    assert kept.tolist() == [[1, -1, 2, 0, 0, 0, 0]]
    params["gamma"] = (None, 0.3)  # the two largest are dropped, and the next three kept
    kept = merge("breadcrumbs", [base, other], **{**params, "density": (None, 0.5)})
    assert kept.tolist() == [[0, -1, 0, 1, -1, 0, 0]]
    kept = merge("sce", [base, other, -other], select_topk=0.4)
    assert kept.abs().tolist() == [[1, 0, 2, 0, 0, 0, 0]]


def test_signs_that_cancel_out_count_as_positive():
    base = torch.zeros(2).double()
    models = [torch.tensor(x).double() for x in ([1.0, -3.0], [-1.0, 3.0])]
    for word in ("ties", "dare_ties", "della", "breadcrumbs_ties"):
        params = {"density": (None, 1.0, 1.0), "normalize": True, "rescale": False, "lambda": 1.0}
        assert plain(word, [base, *models], **params).tolist() == [1.0, 3.0], word


def test_sce_weighs_small_energies_alike():
    """Below 1e-6, where fine-tunes of large models lie; above, the larger difference wins."""
    base = torch.zeros(SHAPE).double()
    one, other = torch.ones(SHAPE).double(), 3 * torch.ones(SHAPE).double()
    assert close(merge("sce", [base, 1e-4 * one, 1e-4 * other], select_topk=1.0), 2e-4 * one)
    assert close(merge("sce", [base, one, other], select_topk=1.0), 2.8 * one)
    assert close(merge("sce", [base, one, other], select_topk=7.0), 2.8 * one)


def test_a_difference_of_exactly_epsilon_is_none():
    base, other = torch.zeros(3).double(), torch.tensor([0.25, -0.25, 0.5]).double()
    assert merge("ram", [base, other], epsilon=0.25).tolist() == [0, 0, 0.5]


@pytest.mark.parametrize("word", ["ties", "breadcrumbs", "sce", "arcee_fusion"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_thresholds_of_tensors_that_are_not_finite_are_refused(word, bad):
    base, *models = tensors(3, SHAPE)
    models[0][:] = bad
    params = dict(PLAIN[word])
    params |= {"density": (None, 0.3, 0.3)} if "density" in params else {}
    params |= {"select_topk": 0.3} if word == "sce" else {}
    count = 2 if word == "arcee_fusion" else 3
    with pytest.raises(BuildError, match=r"y: .*(infinite|NaN)"):
        merge(word, [base, *models][:count], **params)


# --- what is said of parameters and inputs -------------------------------------------------------


def recipe(word, models, base=None, own=None, **parameters):
    inputs = [{"model": str(model), **({"parameters": own} if own else {})} for model in models]
    made = {"merge_method": word, "models": inputs, "parameters": parameters}
    return {**made, "base_model": str(base)} if base else made


def errors(made):
    return [finding.what for finding in moeforge.check(made).errors]


def test_parameters_and_defaults_are_those_of_mergekit():
    """The table of mergekit 0.1.5; docs/mergekit.md says that recipes mean the same."""
    family = {"weight": "required", "density": 1.0, "lambda": 1.0, "int8_mask": False}
    plain = {**family, "normalize": False, "rescale": False}
    signed = {**family, "normalize": True, "rescale": False}
    table = {
        "arcee_fusion": {},
        "breadcrumbs": {**plain, "gamma": 0.01},
        "breadcrumbs_ties": {**plain, "gamma": 0.01},
        "dare_linear": {**plain, "rescale": True},
        "dare_ties": {**plain, "rescale": True},
        "della": {**signed, "rescale": True, "epsilon": 0.15},
        "della_linear": {**plain, "rescale": True, "epsilon": 0.15},
        "karcher": {"max_iter": 10, "tol": 1e-5},
        "linear": {"weight": "required", "normalize": True},
        "model_stock": {"filter_wise": False},
        "multislerp": {"weight": "required", "normalize_weights": True, "eps": 1e-8},
        "nearswap": {"t": "required"},
        "nuslerp": {"weight": "required", "nuslerp_row_wise": False, "nuslerp_flatten": True},
        "passthrough": {"scale": None},
        "ram": {"epsilon": 1e-5},
        "ramplus_tl": {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5},
        "sce": {"int8_mask": False, "select_topk": 1.0},
        "slerp": {"t": "required"},
        "task_arithmetic": plain,
        "ties": signed,
    }
    found = {
        word: {
            name: "required" if param.default is methods.REQUIRED else param.default
            for name, param in methods.load(word).params.items()
        }
        for word in catalog.names("methods")
    }
    assert found == table


@pytest.mark.parametrize("word", ["della", "della_linear"])
@pytest.mark.parametrize(
    ("density", "epsilon", "fine"),
    [(0.5, 0.5, False), (0.2, 0.3, False), (0.9, 0.1, False), (0.5, -0.1, False)]
    + [(d, e, True) for d, e in [(0.5, 0.49), (1.0, 0.9), (0.0, 0.5), (0.5, 0.0)]],
)
def test_della_keeps_with_probabilities_between_zero_and_one(llamas, word, density, epsilon, fine):
    found = errors(recipe(word, llamas, llamas[0], weight=1, density=density, epsilon=epsilon))
    assert (not found) == fine
    assert fine or (f"{density} ± {epsilon}" in found[0] and "above 0 and below 1" in found[0])


def test_weights_that_sum_to_zero_are_refused_where_they_would_divide(llamas):
    for word, switch in (("linear", "normalize"), ("multislerp", "normalize_weights")):
        made = recipe(word, llamas[:2])
        for entry, weight in zip(made["models"], (1, -1), strict=True):
            entry["parameters"] = {"weight": weight}
        assert "sum to zero" in errors(made)[0]
        assert not errors({**made, "parameters": {switch: False}})


def test_too_few_and_too_many_models(llamas):
    one, two = llamas[:1], llamas[:2]
    assert "takes at least 3 models, here are 2" in errors(recipe("model_stock", two, one[0]))[0]
    for word in ("slerp", "nearswap", "arcee_fusion"):
        found = errors(recipe(word, llamas, one[0], t=0.5))
        assert f"{word} takes 2 models, here are 3" in found[0]
        assert f"{word} takes 2 models, here are 1" in errors(recipe(word, one, one[0], t=0.5))[0]
    found = errors(recipe("nuslerp", llamas, weight=1))
    assert "nuslerp takes 2 models, here are 3" in found[0]
    assert not errors(recipe("nuslerp", llamas, llamas[0], weight=1)), "the base does not count"
    assert (
        "nuslerp takes 2 models, here are 1" in errors(recipe("nuslerp", two, two[0], weight=1))[0]
    )
    assert "passthrough takes 1 model, here are 2" in errors(recipe("passthrough", two))[0]


@pytest.mark.parametrize("word", [w for w in sorted(CASES) if methods.load(w).base == "required"])
def test_a_missing_base_is_refused(llamas, word):
    found = errors(recipe(word, llamas[:2], weight=1, t=0.5))
    assert any(f"{word} needs a base_model" in what for what in found)


def test_parameters_without_effect_are_noted(llamas):
    made = recipe("task_arithmetic", llamas, llamas[0], weight=1, density=0.5, gamma=0.1)
    made["parameters"] |= {"rescale": True, "int8_mask": True}
    notes = {show_path(note.path): note.what for note in moeforge.check(made).notes}
    assert notes == {
        "$.parameters.density": '"density" has no effect in task_arithmetic',
        "$.parameters.rescale": '"rescale" has no effect in task_arithmetic',
        "$.parameters.gamma": 'method task_arithmetic has no parameter "gamma"; it is unused',
    }


@pytest.mark.parametrize("word", ["ties", "della", "sce", "ram", "ramplus_tl", "task_arithmetic"])
def test_the_base_alone_is_copied(llamas, word):
    plan = moeforge.plan(recipe(word, llamas[:1], llamas[0], weight=1))
    assert plan.bytes_copied == plan.nbytes


def test_without_a_scale_passthrough_copies(llamas):
    plan = moeforge.plan(recipe("passthrough", llamas[:1]))
    assert plan.bytes_copied == plan.nbytes


def test_slerp_puts_the_base_first_wherever_it_is_listed(llamas, tmp_path):
    first, second = (load_file(folder / "model.safetensors") for folder in llamas[:2])
    moeforge.build(recipe("slerp", llamas[:2], llamas[1], t=0.0), tmp_path / "out")
    result = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.allclose(result[name], second[name], atol=1e-6) for name in second)
    assert not all(torch.allclose(result[name], first[name], atol=1e-2) for name in first)

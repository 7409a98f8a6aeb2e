"""Every merge method against an independent formula in float64, and its corner cases."""

import math

import pytest
import torch
from safetensors.torch import load_file

import moeforge
from moeforge import catalog, methods
from moeforge.methods import slerp

SHAPE = (37, 53)


def tensors(count, seed=0, similar=False):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    if similar:
        return [
            base + 1e-2 * torch.randn(SHAPE, generator=generator, dtype=torch.float64)
            for _ in range(count)
        ]
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count)]


def apply(word, inputs, dtype=torch.float32, **params):
    """Run a method as the engine would: measured in blocks, merged in slices."""
    method = methods.load(word)
    given = [tensor.to(dtype).flatten() for tensor in inputs]
    stats = ()
    if method.measure:
        blocks = [
            method.measure([t[i : i + 500] for t in given], params)
            for i in range(0, len(given[0]), 500)
        ]
        stats = tuple(map(math.fsum, zip(*blocks, strict=True)))
    parts = [
        method.merge([t[i : i + 700].clone() for t in given], params, stats)
        for i in range(0, len(given[0]), 700)
    ]
    return torch.cat(parts).reshape(SHAPE)


def linear(inputs, weight, normalize):
    total = sum(w * x for w, x in zip(weight, inputs, strict=True))
    return total / sum(weight) if normalize else total


def spherical(inputs, t):
    """Rotate a towards b: Gram-Schmidt, unlike the two-sine form of the method."""
    a, b = inputs[0].flatten(), inputs[1].flatten()
    u = a / a.norm()
    v = b / b.norm()
    angle = math.acos(max(-1.0, min(1.0, float(u @ v))))
    if abs(math.cos(angle)) > 0.9995:
        return ((1 - t) * a + t * b).reshape(SHAPE)
    # sin((1−t)θ)/sinθ · a + sin(tθ)/sinθ · b, with the sines by the addition theorem.
    factor_b = math.sin(t * angle) / math.sin(angle)
    factor_a = math.cos(t * angle) - factor_b * math.cos(angle)
    return (factor_a * a + factor_b * b).reshape(SHAPE)


CASES = {
    "linear": [
        (linear, 3, {"weight": (1.0, 2.0, 0.5), "normalize": True}),
        (linear, 3, {"weight": (1.0, -0.7, 0.25), "normalize": False}),
        (linear, 1, {"weight": (3.0,), "normalize": True}),
    ],
    "passthrough": [(lambda inputs, scale: scale[0] * inputs[0], 1, {"scale": (-1.5,)})],
    "slerp": [(spherical, 2, {"t": t}) for t in (0.0, 0.3, 0.5, 1.0, 1.4, -0.2)],
}


def every_case():
    return [
        pytest.param(word, *case, id=f"{word}-{number}")
        for word in catalog.names("methods")
        for number, case in enumerate(CASES[word])
    ]


@pytest.mark.parametrize("similar", [False, True])
@pytest.mark.parametrize(("word", "formula", "count", "params"), every_case())
def test_agrees_with_an_independent_formula(word, formula, count, params, similar):
    inputs = tensors(count, similar=similar)
    expected = formula(inputs, **params)
    result = apply(word, inputs, **params)
    assert result.dtype == torch.float32
    scale = max(float(tensor.abs().max()) for tensor in inputs)
    assert (result.double() - expected).abs().max() < 4e-6 * scale
    exact = apply(word, inputs, torch.float64, **params)
    assert exact.dtype == torch.float64
    assert (exact - expected).abs().max() < 1e-12 * scale


def test_slerp_of_a_zero_tensor_keeps_the_other_on_the_arc():
    zero, (other,) = torch.zeros(SHAPE, dtype=torch.float64), tensors(1)
    # θ = 90°: what remains is sin(t·90°) of the other, not t of it.
    expected = math.sin(0.3 * math.pi / 2) * other
    assert (apply("slerp", [zero, other], t=0.3).double() - expected).abs().max() < 1e-5
    assert apply("slerp", [zero, zero], t=0.3).abs().max() == 0


def test_slerp_of_opposite_tensors_is_a_straight_line():
    (one,) = tensors(1)
    assert apply("slerp", [one, -one], t=0.5).abs().max() == 0
    result = apply("slerp", [one, -one], t=0.25)
    assert (result.double() - 0.5 * one).abs().max() < 1e-5


def test_slerp_is_straight_only_where_the_arc_is_flat():
    assert slerp.coefficients(0.3, (1.0, 1.0, 0.9996)) == (0.7, 0.3)
    a, b = slerp.coefficients(0.3, (1.0, 1.0, 0.5))
    assert a + b > 1.0, "an arc is longer than its chord"


def test_linear_weights_that_sum_to_zero_are_refused(llamas):
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": str(llamas[0]), "parameters": {"weight": 1}},
            {"model": str(llamas[1]), "parameters": {"weight": -1}},
        ],
    }
    report = moeforge.check(recipe)
    assert "sum to zero" in report.errors[0].what
    recipe["parameters"] = {"normalize": False}
    assert not moeforge.check(recipe).errors


def test_slerp_puts_the_base_first_wherever_it_is_listed(llamas, tmp_path):
    first, second = (load_file(folder / "model.safetensors") for folder in llamas[:2])
    recipe = {
        "merge_method": "slerp",
        "base_model": str(llamas[1]),
        "models": [{"model": str(folder)} for folder in llamas[:2]],
        "parameters": {"t": 0.0},
    }
    moeforge.build(recipe, tmp_path / "out")
    result = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.allclose(result[name], second[name], atol=1e-6) for name in second)
    assert not all(torch.allclose(result[name], first[name], atol=1e-2) for name in first)

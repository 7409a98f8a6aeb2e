"""Random masks: the documented generator, the same however work is divided; seeds of recipes."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import rankdata

from moeforge import forge, kernels
from moeforge.methods import Place
from moeforge.methods._random import derive, draws, drop
from moeforge.methods._rank import thin_by_rank


def splitmix64(seed, count):
    """The generator as published, in Python's integers: Steele, Lea, Flood, OOPSLA 2014."""
    state, found = seed, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        found.append(z ^ z >> 31)
    return found


def uniform16(key, count):
    """Draw of each element as documented: 16 bits of a word of splitmix64, the lowest first.

    They are taken as signed numbers: draw u stands for u − 2¹⁵, so an element is kept with
    probability p where u < p·2¹⁶ after the top bit is turned over.
    """
    steps = np.arange(1, count // 4 + 2, dtype=np.uint64)
    z = np.uint64(key) + steps * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    parts = [z >> np.uint64(16 * part) & np.uint64(0xFFFF) for part in range(4)]
    return (np.stack(parts, 1).ravel()[:count] ^ np.uint64(0x8000)).astype(np.int64)


def key_of(*parts):
    """Key as documented: blake2b of the parts with zero bytes between them."""
    text = b"\0".join(str(part).encode() for part in parts)
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


# --- the generator -------------------------------------------------------------------------------


def test_the_oracle_is_splitmix64():
    """Outputs for seed 1234567 as rosettacode.org lists them."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix64(1234567, 5) == published
    bits = [word >> 16 * part & 0xFFFF for word in published for part in range(4)]
    assert (uniform16(1234567, 20) ^ 0x8000).tolist() == bits


@pytest.mark.parametrize("key", [0, 1, 1234567, 2**63, 2**64 - 1])
def test_draws_are_those_of_the_published_generator(key):
    assert (draws(key, 0, 4001).astype(np.int64) + 2**15).tolist() == uniform16(key, 4001).tolist()


def test_keys_are_those_documented():
    assert derive(7, "model.norm.weight", 2) == key_of(7, "model.norm.weight", 2)
    assert derive("a", "b") != derive("ab")
    # printf '7\\0000' | b2sum -l 64
    assert derive(7, 0).to_bytes(8, "little").hex() == "cb1f28672f9b3c7a"


def test_draws_do_not_depend_on_the_division():
    whole = draws(99, 0, 10_000)
    for borders in ([1, 2, 3, 5, 8191], [4, 4096], [9999], range(1, 10_000, 997)):
        ends = [0, *borders, 10_000]
        parts = [draws(99, a, b - a) for a, b in pairwise(ends)]
        assert np.array_equal(np.concatenate(parts), whole)
    assert len(draws(99, 17, 0)) == 0
    far = 2**40 + 3  # beyond 32 bits: element i is in word i // 4
    (word,) = splitmix64(99 + 2**38 * 0x9E3779B97F4A7C15 % 2**64, 1)
    assert int(draws(99, far, 1)[0]) + 2**15 == word >> 48 ^ 0x8000


def test_draws_are_uniform_and_independent():
    """Bounds are five standard errors of n independent uniform draws."""
    n = 2**20
    drawn = draws(derive("any"), 0, n).astype(np.float64) / 2**16
    bound = 5 / np.sqrt(n)
    assert abs(drawn.mean()) < bound * np.sqrt(1 / 12)
    assert abs(drawn.var() - 1 / 12) < bound * np.sqrt(1 / 180)
    other = draws(derive("other"), 0, n).astype(np.float64) / 2**16
    for lag in (1, 2, 3, 4, 5, 8, 64, 4096):
        assert abs(np.corrcoef(drawn[:-lag], drawn[lag:])[0, 1]) < bound
    assert abs(np.corrcoef(drawn, other)[0, 1]) < bound
    # Every one of the 2¹⁶ values comes about 16 times: χ² with 65535 degrees of freedom.
    counts = np.bincount(draws(derive("any"), 0, n).astype(np.int64) + 2**15, minlength=2**16)
    chi2 = float(((counts - 16.0) ** 2 / 16).sum())
    assert abs(chi2 - 65535) < 5 * np.sqrt(2 * 65535)


# --- masks ---------------------------------------------------------------------------------------


def kept(density, key=1, index=0, count=2**16, start=0, act=drop, **params):
    """1 where an element of a vector of ones is kept."""
    delta = torch.ones(count)
    params = {"density": (None,) * (index + 1) + (density,), "key": key, **params}
    act(index, delta, params, None, Place((start + count,), start))
    return delta


@pytest.mark.parametrize("density", [0.0, -0.5, 2.0**-18, 2.0**-16, 0.1, 0.5, 0.9, 1 - 2.0**-18])
def test_densities_are_rounded_to_a_65536th(density):
    bound = round(max(density, 0.0) * 65536)
    expected = uniform16(key_of(1, 0), 2**16) < bound
    assert np.array_equal(kept(density).numpy() > 0, expected)
    if bound in (0, 65536):
        assert float(kept(density).sum()) == bound


def test_inputs_tensors_and_seeds_have_draws_of_their_own():
    masks = [
        kept(0.5, key=derive(*seed, name), index=index)
        for seed in ((0, 0), (0, 1), (1, 0))
        for name in ("a", "b")
        for index in (0, 1)
    ]
    for i, one in enumerate(masks):
        assert abs(float(one.mean()) - 0.5) < 5 * 0.5 / 256
        for other in masks[:i]:
            both = float((one * other).mean())
            assert abs(both - 0.25) < 5 * np.sqrt(0.25 * 0.75) / 256


def test_rows_of_one_element_are_kept_with_probability_density():
    delta = torch.ones(2**16)
    params = {"density": (None, 0.3), "epsilon": (None, 0.2), "key": 5}
    thin_by_rank(0, delta, params, None, Place((2**16, 1), 0))
    assert np.array_equal(delta.numpy() > 0, uniform16(key_of(5, 0), 2**16) < round(0.3 * 65536))


def test_larger_deltas_are_kept_more_often():
    """In 4096 rows of 9, rank r is kept with probability 0.5 − 0.4 + 0.8·r/8: each rank counts."""
    values = torch.rand(4096, 9, generator=torch.Generator().manual_seed(1)) + 0.1
    delta = values.clone().flatten()
    params = {"density": (None, 0.5), "epsilon": (None, 0.4), "key": 5}
    thin_by_rank(0, delta, params, None, Place((4096, 9), 0))
    order = values.argsort(1)
    shares = (delta.view(4096, 9) > 0).float().gather(1, order).mean(0)
    expected = torch.tensor([0.1 + 0.1 * rank for rank in range(9)])
    assert bool(((shares - expected).abs() < 5 * (expected * (1 - expected) / 4096).sqrt()).all())


@pytest.mark.parametrize("compiled", [False, True])
def test_equal_deltas_are_kept_with_the_probability_of_their_mean_rank(compiled):
    """None is kept more often for where it stands in its row."""
    values = torch.randint(5, (40, 300), generator=torch.Generator().manual_seed(1)) * 0.25
    values[0], values[1, ::2] = 1.0, -values[1, ::2]
    delta, params = values.clone().flatten(), {"density": (None, 0.5), "epsilon": (None, 0.4)}
    if compiled:
        assert kernels.load(["thinning"], narrow=True)
    try:
        thin_by_rank(0, delta, {**params, "key": 5}, None, Place((40, 300), 0))
    finally:
        kernels.unload()
    ranks = rankdata(values.abs().numpy(), axis=1) - 1  # from 0; means, where some are equal
    bounds = np.round((0.1 + 0.8 * ranks / 299) * 2**16).flatten()
    kept = uniform16(key_of(5, 0), delta.numel()) < bounds
    assert np.array_equal(delta.numpy(), np.where(kept, values.flatten().numpy(), 0))


# --- seeds of recipes ----------------------------------------------------------------------------


def dare(llamas, other=1, **extra):
    return {
        "merge_method": "dare_linear",
        "base_model": str(llamas[0]),
        "models": [{"model": str(llamas[other]), "parameters": {"weight": 1}}],
        "parameters": {"density": 0.5},
        **extra,
    }


def mean_of(*models, **extra):
    inputs = [{"model": model, "parameters": {"weight": 1}} for model in models]
    return {"merge_method": "linear", "models": inputs, "dtype": "float32", **extra}


@pytest.fixture
def built(tmp_path):
    """Builds a recipe and returns its tensors."""
    count = iter(range(100))

    def build(recipe, **settings):
        folder = tmp_path / str(next(count))
        forge.build(recipe, folder, **settings)
        return load_file(folder / "model.safetensors")

    return build


def differ(one, other):
    """Names of the tensors that are not the same."""
    return {name for name in one if not torch.equal(one[name], other[name])}


def test_the_mask_of_a_tensor_follows_from_seed_name_and_input(llamas, built):
    """The whole way: the mask of each tensor of a build is the documented one."""
    base, other = (load_file(folder / "model.safetensors") for folder in llamas[:2])
    result = built(dare(llamas, parameters={"density": 0.5, "rescale": False}, seed=11))
    for name, tensor in result.items():
        mask = uniform16(key_of(key_of(11, 0, name), 0), tensor.numel()) < 2**15
        expected = base[name] + (other[name] - base[name]) * torch.from_numpy(mask).view_as(tensor)
        assert torch.equal(tensor, expected), name


def test_the_seed_of_a_recipe_decides(llamas, built):
    default, zero, one = (built(dare(llamas, **s)) for s in ({}, {"seed": 0}, {"seed": 1}))
    assert not differ(default, zero)
    assert differ(default, one) == set(one)
    assert not differ(one, built(dare(llamas, seed=1), threads=3))


def test_an_inline_recipe_with_a_seed_is_the_model_that_it_makes_alone(llamas, built):
    alone = built(dare(llamas, seed=7))
    within = built(mean_of(dare(llamas, seed=7), seed=3))
    assert not differ(alone, within)
    # Also one level further down, where the seed of what is around it does not reach.
    deeper = built(mean_of(mean_of(dare(llamas, seed=7)), seed=3))
    assert not differ(alone, deeper)


def test_inline_siblings_without_a_seed_have_masks_of_their_own(llamas, built):
    """Each has the seed around it and its number; in what they do they are the same."""
    plain = {"density": 0.5, "rescale": False}
    siblings = [dare(llamas, parameters=plain), dare(llamas, parameters={**plain, "lambda": 1.0})]
    base, other = (load_file(folder / "model.safetensors") for folder in llamas[:2])
    name = "lm_head.weight"
    result = built(mean_of(*siblings, seed=4))[name]
    masks = [
        torch.from_numpy(uniform16(key_of(key_of(4, number, name), 0), result.numel()) < 2**15)
        for number in (1, 2)
    ]
    assert not torch.equal(*masks)
    share = (masks[0].float() + masks[1].float()).view_as(result) / 2
    expected = base[name] + (other[name] - base[name]) * share
    assert (result - expected).abs().max() < 1e-6


def test_the_same_inline_recipe_twice_is_one_model(llamas, built):
    inline = dare(llamas)
    plan = forge.plan(mean_of(inline, mean_of(inline)))
    for tensor in plan.tensors:
        first, second = tensor.expr.inputs
        assert first is second.inputs[0]
    assert not differ(built(mean_of(inline)), built(mean_of(inline, mean_of(inline))))

"""Parity with mergekit 0.1.5: the golden files of tests/parity, and what random methods promise.

mergekit draws its masks from one stream for all tensors; ours follow from the recipe alone. Masks
are therefore compared with the probabilities that they stand for, not with mergekit's masks.
"""

from __future__ import annotations

import pytest
import torch
from parity import compare
from safetensors.torch import load_file

import moeforge

MODELS = compare.HERE / "models"
DENSITY, EPSILON, WEIGHT = 0.4, 0.3, 0.7


@pytest.mark.parametrize("name", compare.NAMES)
def test_recipe_gives_what_mergekit_gives(name, tmp_path):
    assert compare.compare(name, tmp_path / "out").wrong == []


@pytest.mark.parametrize("name", [n for n, m in compare.MEANT.items() if m.ids])
def test_differences_that_are_meant_are_there(name, tmp_path):
    assert compare.compare(name, tmp_path / "out", compare.NOTHING).wrong


def test_recipes_and_golden_files_belong_together():
    golden = {path.stem for path in (compare.HERE / "golden").iterdir()}
    assert golden == set(compare.NAMES)
    assert compare.MEANT.keys() <= golden


# --- random methods -------------------------------------------------------------------------------


def deltas(method, out, **parameters):
    """Merge one far fine-tune into its base; yield per tensor its delta and the result's."""
    base, tuned = MODELS / "base", MODELS / "d"
    recipe = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(tuned), "parameters": {"weight": WEIGHT, "density": DENSITY}}],
        "parameters": {"normalize": False, **parameters},
    }
    moeforge.build(recipe, out)
    b, x, y = (load_file(folder / "model.safetensors") for folder in (base, tuned, out))
    for name in b:
        yield x[name].double() - b[name].double(), y[name].double() - b[name].double()


def kept(delta, result):
    """Which elements are kept; every element must be kept whole or not at all."""
    # Results are float32 numbers of about one: the base rounds off what is smaller than this.
    tiny = 1e-6
    whole = (result - WEIGHT * delta).abs() < tiny
    assert (whole | (result.abs() < tiny)).all()
    clear = (WEIGHT * delta).abs() > 10 * tiny
    assert clear.double().mean() > 0.9
    return whole & clear, clear


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_masks_keep_whole_elements_as_often_as_density_says(method, tmp_path):
    extra = {"epsilon": EPSILON} if method.startswith("della") else {}
    masks = [kept(*pair) for pair in deltas(method, tmp_path / "out", rescale=False, **extra)]
    hits = sum(mask.sum().item() for mask, _ in masks)
    count = sum(clear.sum().item() for _, clear in masks)
    # With ranks the variance is smaller than that of `count` equal draws: the bound holds for it.
    assert abs(hits - DENSITY * count) < 5 * (count * DENSITY * (1 - DENSITY)) ** 0.5


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della_keeps_elements_by_their_rank_in_the_row(method, tmp_path):
    hits, rows, length = torch.zeros(16), 0, 16
    for delta, result in deltas(method, tmp_path / "out", rescale=False, epsilon=EPSILON):
        if delta.shape[-1] != length:
            continue
        mask, _ = kept(delta, result)
        order = delta.reshape(-1, length).abs().argsort(dim=1)
        hits += mask.reshape(-1, length).gather(1, order).sum(0)
        rows += len(order)
    chance = DENSITY - EPSILON + 2 * EPSILON * torch.arange(length) / (length - 1)
    assert rows > 200
    assert ((hits - rows * chance).abs() < 5 * (rows * chance * (1 - chance)).sqrt()).all()


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_rescaled_masks_keep_the_sum_of_magnitudes(method, tmp_path):
    extra = {"epsilon": EPSILON} if method.startswith("della") else {}
    changed = 0
    for delta, result in deltas(method, tmp_path / "out", rescale=True, **extra):
        if not result.any():
            continue  # nothing of this tensor was kept
        torch.testing.assert_close(
            result.abs().sum(), WEIGHT * delta.abs().sum(), rtol=1e-5, atol=0.0
        )
        changed += 1
    assert changed > 15

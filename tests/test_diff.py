"""What `diff` says of two checkpoints, against numpy's own arithmetic."""

import json

import numpy as np
import pytest
import torch
import warm
from safetensors.torch import load_file, save_file

import moeforge

WEIGHTS = "model.safetensors"


def values(tensor):
    return tensor.to(torch.float32).numpy().astype(np.float64).ravel()


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float16")])
def test_numbers_are_numpys(dtypes, models):
    a, b = (models("llama", seed=n, dtype=getattr(torch, d)) for n, d in enumerate(dtypes))
    mine, theirs = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    found = moeforge.diff(a, b)
    assert {t.name for t in found.tensors} == mine.keys()
    squares = {}
    for tensor in found.tensors:
        x, y = values(mine[tensor.name]), values(theirs[tensor.name])
        norms = np.linalg.norm(x), np.linalg.norm(y)
        assert tensor.sums.cosine == pytest.approx(x @ y / norms[0] / norms[1], abs=1e-12)
        assert tensor.sums.relative == pytest.approx(np.linalg.norm(x - y) / norms[0], rel=1e-12)
        assert tensor.sums.largest == np.abs(x - y).max()
        assert not tensor.equal
        squares.setdefault(tensor.layer, []).append((np.sum((x - y) ** 2), np.sum(x**2)))
    assert found.layers == ("0", "1", "2", "3", "outside layers")
    data = json.loads(shown(a, b, "--json", code=1))
    for layer, pairs in squares.items():
        dd, aa = np.sum(pairs, axis=0)
        assert data["layers"][layer]["relative"] == pytest.approx(np.sqrt(dd / aa), rel=1e-12)


def shown(a, b, *options, code):
    done = warm.moeforge("diff", a, b, *options)
    assert done.returncode == code, done.stderr
    return done.stdout


def test_large_tensors_are_compared_slice_by_slice(models, monkeypatch):
    a, b = (models("llama", seed=seed) for seed in (1, 2))
    whole = moeforge.diff(a, b)
    monkeypatch.setattr("moeforge.proof.diff._CHUNK", 1000)
    for one, other in zip(whole.tensors, moeforge.diff(a, b).tensors, strict=True):
        assert one.sums.cosine == pytest.approx(other.sums.cosine, rel=1e-12)
        assert one.sums.largest == other.sums.largest


def test_the_same_in_other_files_is_the_same(models):
    a, b = models("llama"), models("llama", shard_size="200kB")
    assert moeforge.diff(a, b).same
    assert "all 39 tensors are the same, byte for byte" in shown(a, b, code=0)


def test_what_only_one_has_and_other_shapes(models, tmp_path):
    a, b = models("llama"), models.copy(models("llama"), "another")
    tensors = load_file(b / WEIGHTS)
    tensors["extra[/x].weight"] = torch.ones(3)
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:10].clone()
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, b / WEIGHTS, metadata={"format": "pt"})
    text = shown(a, b, "--png", str(tmp_path / "map.png"), code=1)
    assert "only in A: model.norm.weight" in text
    assert "only in B: extra[/x].weight" in text
    assert "lm_head.weight: float32 [300, 64] in A, float32 [10, 64] in B" in text
    import matplotlib.image

    pixels = matplotlib.image.imread(tmp_path / "map.png")[..., :3].reshape(-1, 3)
    equal, not_finite = (0.85, 0.85, 0.85), (0.839, 0.153, 0.157)
    for colour in (equal, not_finite):
        assert (abs(pixels - colour).max(axis=1) < 0.01).sum() > 1000, colour
    data = json.loads(shown(a, b, "--json", code=1))
    spoilt = {t["name"]: t for t in data["tensors"]}["model.layers.2.mlp.up_proj.weight"]
    assert (spoilt["equal"], spoilt["cosine"]) == (False, None)


def test_experts_of_a_layer_are_one_kind(models):
    folder = models("mixtral", num_local_experts=4)
    kinds = moeforge.diff(folder, folder).kinds
    assert sum("experts" in kind for kind in kinds) == 3, kinds


def test_float8_codes_are_compared_by_value(models):
    """The same model in float8: rounding to three bits of mantissa is off by 2⁻⁴ at most."""
    a = models.copy(models("llama"), "wide")
    b = models.copy(models("llama"), "narrow")
    tensors = {n: t.to(torch.float8_e4m3fn) for n, t in load_file(b / WEIGHTS).items()}
    save_file(tensors, b / WEIGHTS, metadata={"format": "pt"})
    found = moeforge.diff(a, b)
    assert all(0 < t.sums.relative < 2**-4 for t in found.tensors)

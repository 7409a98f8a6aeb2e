"""Float8 checkpoints: codes become the numbers that they stand for, or are refused by name."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_inputs import SAFE, UP, held, linear, spec, weighted_mean
from tiny import edit_config
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import moeforge
from moeforge.engine.dequantize import dequantized_rows
from moeforge.errors import SourceError
from moeforge.planners.model import from_source
from moeforge.plans import Dequantize, Read
from moeforge.sources import open_source
from moeforge.sources.quantized import block_length

SIZES = {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 2}
"""Matrices of 192 and 320 rows and columns: the last block of 128 is not a whole one."""


def fit(matrix, dtype):
    """Codes and factor by which they are to be multiplied, for one block."""
    factor = matrix.abs().max() / torch.finfo(dtype).max
    return (matrix / factor).to(dtype), factor


def by_blocks(matrix, dtype):
    rows, columns = matrix.shape
    codes = torch.empty(matrix.shape, dtype=dtype)
    scale = torch.empty(-(-rows // 128), -(-columns // 128))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            place = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            codes[place], scale[i, j] = fit(matrix[place], dtype)
    return codes, scale


def by_rows(matrix, dtype):
    pairs = [fit(row, dtype) for row in matrix]
    return torch.stack([c for c, _ in pairs]), torch.stack([f for _, f in pairs])[:, None]


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
GROUP = {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"}, "targets": ["Linear"]}
FORMATS = {
    "DeepSeek": (
        by_blocks,
        E4M3,
        "_scale_inv",
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
    ),
    "e5m2": (by_blocks, E5M2, "_scale_inv", {"quant_method": "fp8"}),
    "static": (fit, E4M3, "_scale", {"quant_method": "fp8", "activation_scheme": "static"}),
    "compressed-tensors": (
        by_rows,
        E4M3,
        "_scale",
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": GROUP}},
    ),
    "fbgemm": (by_rows, E4M3, "_scale", {"quant_method": "fbgemm_fp8"}),
}


def to_float8(folder, models, kind):
    """A copy with every projection in float8; returns it, and what its tensors stand for."""
    quantize, dtype, suffix, settings = FORMATS[kind]
    folder = models.copy(folder, f"float8-{len(list(models.root.iterdir()))}")
    stored, meant = {}, {}
    for name, tensor in load_file(folder / SAFE).items():
        stored[name] = meant[name] = tensor
        if not name.endswith("proj.weight"):
            continue
        codes, scale = quantize(tensor.float(), dtype)
        stored[name], stored[f"{name}{suffix}"] = codes, scale
        rows, columns = tensor.shape
        full = scale.double().expand(rows, columns) if suffix == "_scale" else scale.double()
        if suffix == "_scale_inv":
            full = full.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
        meant[name] = codes.double() * full
        if settings.get("activation_scheme") == "static":
            stored[name.removesuffix("weight") + "input_scale"] = torch.tensor(0.1)
    save_file(stored, folder / SAFE, metadata={"format": "pt"})
    edit_config(folder, quantization_config=settings)
    return folder, meant


@pytest.fixture
def plain(models):
    return models("llama", seed=4, dtype=torch.bfloat16, **SIZES)


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_of_float8_are_their_codes_times_their_scales(kind, plain, models):
    folder, meant = to_float8(plain, models, kind)
    stored, suffix = load_file(folder / SAFE), FORMATS[kind][2]
    for name in (UP, UP.replace("up", "down")):
        codes, scale = stored[name].float(), stored[name + suffix]
        rows = len(codes)
        for first, last in ((0, rows), (0, 1), (127, 130), (rows - 70, rows)):
            result = dequantized_rows(codes[first:last], first, rows, scale)
            assert result.dtype == torch.float32
            error = (result.double() - meant[name][first:last]).abs().max()
            assert error <= 1e-7 * meant[name].abs().max()


def test_a_dimension_tells_its_blocks_or_is_refused():
    assert [block_length(300, n) for n in (1, 300, 3)] == [300, 1, 128]
    assert [block_length(128, n) for n in (1, 128)] == [128, 1]
    assert [block_length(300, n) for n in (0, 2, 4, 150, 301)] == [None] * 5


@pytest.mark.parametrize("kind", FORMATS)
def test_a_float8_checkpoint_is_planned_as_numbers(kind, plain, models):
    folder, meant = to_float8(plain, models, kind)
    model = from_source(open_source(str(folder)))
    assert model.tensors.keys() == meant.keys()
    assert {t.spec.dtype.name for t in model.tensors.values()} == {"bfloat16"}
    read = [Read(str(folder), name) for name in (UP, UP + FORMATS[kind][2])]
    assert model.tensors[UP].expr == Dequantize(*read)
    assert "quantization_config" not in model.config
    assert "14 float8 tensors" in model.notes[0].what
    static = {n for n in load_file(folder / SAFE) if n.endswith("input_scale")}
    assert static == {read.name for read in model.left_out}


@pytest.mark.parametrize("kind", FORMATS)
def test_float8_checkpoints_merge_by_value(kind, plain, models, tmp_path):
    folder, meant = to_float8(plain, models, kind)
    moeforge.build(linear(plain, folder, dtype="float32"), tmp_path / "out")
    mine, result = load_file(plain / SAFE), load_file(tmp_path / "out" / SAFE)
    assert result.keys() == meant.keys()
    for name, tensor in result.items():
        expected = weighted_mean([mine[name], meant[name]])
        assert (tensor.double() - expected).abs().max() <= 1e-6 * expected.abs().max(), name
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_transformers_reads_the_same_numbers(models, tmp_path):
    whole = {**SIZES, "hidden_size": 256, "intermediate_size": 384}  # all that it can read
    plain = models("llama", seed=4, dtype=torch.bfloat16, **whole)
    folder, _ = to_float8(plain, models, "DeepSeek")
    recipe = {"merge_method": "passthrough", "models": [{"model": str(folder)}]}
    moeforge.build(recipe, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16
    ).state_dict()
    for name, tensor in load_file(tmp_path / "out" / SAFE).items():
        assert torch.equal(tensor, theirs[name]), name


FP8, F32 = "float8_e4m3fn", "float32"
BLOCKS_64 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}
UNFIT = {
    "no scale": ({}, {"x.weight": spec(FP8, 4, 4)}, "x.weight is float8_e4m3fn [4, 4] and has no"),
    "three dimensions": (
        {},
        {"x": spec(FP8, 2, 4, 4), "x_scale": spec(F32, 2)},
        "x_scale is float32 [2], which is not a scale for blocks of x",
    ),
    "exponents": (
        {},
        {"x": spec(FP8, 4, 4), "x_scale": spec("uint8", 1, 1)},
        "x_scale is uint8 [1, 1], which is not a scale for blocks of x",
    ),
    "wrong rows": (
        {},
        {"x": spec(FP8, 300, 4), "x_scale": spec(F32, 2, 1)},
        "x_scale is float32 [2, 1], which does not divide the rows of x",
    ),
    "one for each shard of a fused matrix": (
        {},
        {"x": spec(FP8, 600, 4), "x_scale": spec(F32, 3)},
        "does not divide the rows",
    ),
    "other blocks": (
        BLOCKS_64,
        {"x": spec(FP8, 256, 256), "x_scale": spec(F32, 2, 2)},
        "does not divide the rows",
    ),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_scales_that_do_not_fit_are_refused(kind):
    config, specs, said = UNFIT[kind]
    with pytest.raises(SourceError) as caught:
        from_source(held(specs, config))
    assert said in str(caught.value)


def test_the_dtype_of_float8_is_the_configs():
    specs = {"x": spec(FP8, 4, 4), "x_scale": spec(F32), "y.k_scale": spec(F32)}
    for config, expected in (
        ({}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "float32", "torch_dtype": "float16"}, "float32"),
        ({"torch_dtype": FP8}, "bfloat16"),
    ):
        model = from_source(held(specs, config))
        assert model.tensors["x"].spec.dtype.name == expected
    assert [read.name for read in model.left_out] == ["y.k_scale"]
    assert "y.k_scale" in from_source(held({"y.k_scale": spec(F32)})).tensors

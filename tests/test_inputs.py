"""Kinds of checkpoints: PyTorch's own files, mixtures, and what is refused by its name."""

import json
import os
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import edit_config
from transformers import AutoModelForCausalLM

import moeforge
from moeforge.errors import SourceError
from moeforge.planners.model import from_source
from moeforge.sources import open_source
from moeforge.sources.memory import MemorySource
from moeforge.tensors import BY_NAME, TensorSpec

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
UP = "model.layers.1.mlp.up_proj.weight"


def linear(*folders, **changes):
    models = [{"model": str(f), "parameters": {"weight": i + 1}} for i, f in enumerate(folders)]
    return {"merge_method": "linear", "models": models, **changes}


def weighted_mean(tensors):
    """(1·t0 + 2·t1 + …) / (1 + 2 + …) in float64."""
    total = sum((i + 1) * tensor.double() for i, tensor in enumerate(tensors))
    return total / sum(range(1, len(tensors) + 1))


def refusal(folder):
    """What `check` says against a passthrough of `folder`: one finding."""
    recipe = {"merge_method": "passthrough", "models": [{"model": str(folder)}]}
    report = moeforge.check(recipe)
    assert report.exit_code == SourceError.exit_code, report
    (finding,) = report.errors
    return f"{finding.what}\n{finding.fix}"


def raw(tensor):
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())


def spec(dtype, *shape):
    return TensorSpec(BY_NAME[dtype], shape)


def held(specs, config=None):
    """A checkpoint in memory with zeros of these specs."""
    tensors = {name: (s, bytes(s.nbytes)) for name, s in specs.items()}
    return MemorySource("acme", tensors, config)


# --- PyTorch's own files -------------------------------------------------------------------------


def to_pickle(folder, models, shards=1):
    """A copy of a checkpoint with its weights in PyTorch's own format."""
    folder = models.copy(folder, f"pickled-{len(list(models.root.iterdir()))}")
    tensors = load_file(folder / SAFE)
    (folder / SAFE).unlink()
    if shards == 1:
        torch.save(tensors, folder / PICKLED)
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        part = {name: tensors[name] for name in sorted(tensors)[number::shards]}
        torch.save(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / f"{PICKLED}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_a_pickled_checkpoint_is_the_same_model(shards, llamas, models, tmp_path):
    pickled = to_pickle(llamas[1], models, shards)
    moeforge.build(linear(llamas[0], llamas[1]), tmp_path / "safe")
    moeforge.build(linear(llamas[0], pickled), tmp_path / "pickled")
    assert (tmp_path / "safe" / SAFE).read_bytes() == (tmp_path / "pickled" / SAFE).read_bytes()


def test_a_pickled_checkpoint_is_copied(llamas, models, tmp_path):
    layers = {"model": str(to_pickle(llamas[0], models)), "layer_range": [0, 4]}
    moeforge.build({"slices": [{"sources": [layers]}]}, tmp_path / "out")
    result, original = load_file(tmp_path / "out" / SAFE), load_file(llamas[0] / SAFE)
    assert result.keys() == original.keys()
    assert all(torch.equal(result[name], original[name]) for name in original)


def odd_tensors():
    """Every way in which a tensor may lie in a storage."""
    matrix = torch.arange(1200.0).view(40, 30)
    return {
        "plain": matrix,
        "shared": matrix,
        "rows": matrix[3:9],
        "transposed": matrix.t(),
        "columns": matrix[:, 2:9],
        "expanded": torch.arange(5.0)[:, None].expand(5, 6),
        "parameter": torch.nn.Parameter(torch.ones(3, 3)),
        "number": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "half": torch.arange(7.0).bfloat16(),
        "codes": torch.arange(6.0).to(torch.float8_e4m3fn),
    }


def test_every_layout_is_read_in_row_major_order(llamas, models):
    folder, tensors = models.copy(llamas[0], "layouts"), odd_tensors()
    (folder / SAFE).unlink()
    torch.save(tensors, folder / PICKLED)
    source = open_source(str(folder))
    spans = {name: source.locate(name) for name in tensors}
    for name, tensor in tensors.items():
        spec, expected = source.specs()[name], raw(tensor)
        assert (spec.dtype.name, spec.shape) == (str(tensor.dtype)[6:], tuple(tensor.shape))
        for start in (0, 1, len(expected) // 2):
            out = bytearray(max(len(expected) - start - 1, 0))
            source.read(name, start, memoryview(out))
            assert out == expected[start : start + len(out)], (name, start)
        if span := spans[name]:
            file = span.path.read_bytes()
            assert file[span.offset : span.offset + span.nbytes] == expected
    scattered = {name for name, span in spans.items() if span is None}
    assert scattered == {"transposed", "columns", "expanded", "empty"}


def test_safetensors_are_preferred(llamas, models):
    folder = models.copy(llamas[0], "both")
    torch.save({"other": torch.zeros(1)}, folder / PICKLED)
    assert "other" not in open_source(str(folder)).specs()


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def compressed(tensors, path):
    torch.save(tensors, path)
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)


BAD_PICKLES = {
    "before torch 1.6": (
        lambda t, p: torch.save(t, p, _use_new_zipfile_serialization=False),
        "before torch 1.6",
    ),
    "cut short": (
        lambda t, p: (torch.save(t, p), p.write_bytes(p.read_bytes()[:-200])),
        "damaged",
    ),
    "empty": (lambda t, p: p.write_bytes(b""), "not a readable PyTorch checkpoint"),
    "a list": (lambda t, p: torch.save(list(t.values()), p), "holds a list"),
    "nested": (lambda t, p: torch.save({"model": t}, p), "'model' in it is a dict"),
    "a number": (lambda t, p: torch.save({**t, "step": 3}, p), "'step' in it is a int"),
    "complex": (
        lambda t, p: torch.save({"x": torch.zeros(2, dtype=torch.complex64)}, p),
        "x in it is torch.complex64",
    ),
    "sparse": (lambda t, p: torch.save({"x": torch.eye(3).to_sparse()}, p), "sparse"),
    "compressed": (compressed, "is compressed"),
}


@pytest.mark.parametrize("kind", BAD_PICKLES)
def test_other_pickles_are_refused(kind, llamas, tmp_path):
    write, said = BAD_PICKLES[kind]
    (tmp_path / "config.json").write_bytes((llamas[0] / "config.json").read_bytes())
    write({"a": torch.ones(3, 3), "b": torch.zeros(2)}, tmp_path / PICKLED)
    found = refusal(tmp_path)
    assert str(tmp_path / PICKLED) in found
    assert said in found
    assert "safetensors copy" in found


def test_code_in_a_pickle_is_never_run(llamas, tmp_path):
    (tmp_path / "config.json").write_bytes((llamas[0] / "config.json").read_bytes())
    torch.save({"a": torch.ones(3), "b": Trap(str(tmp_path / "run"))}, tmp_path / PICKLED)
    found = refusal(tmp_path)
    assert "posix.mkdir" in found
    assert "could run code" in found
    assert not (tmp_path / "run").exists()


# --- refused by name -----------------------------------------------------------------------------

FLOAT8 = {"weights": {"type": "float", "num_bits": 8}}
INT4 = {"weights": {"type": "int", "num_bits": 4}}
METHODS = {
    "gptq": ({"bits": 4}, "gptq, 4-bit"),
    "awq": ({"bits": 4}, "awq, 4-bit"),
    "bitsandbytes": ({"load_in_4bit": True}, "bitsandbytes, 4-bit"),
    "bitsandbytes ": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8-bit"),
    "eetq": ({}, "eetq"),
    "hqq": ({}, "hqq"),
    "aqlm": ({}, "aqlm"),
    "mxfp4": ({}, "mxfp4"),
    "torchao": ({}, "torchao"),
    "compressed-tensors": ({"config_groups": {"a": INT4}}, "compressed-tensors, 4-bit"),
    "compressed-tensors ": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"a": FLOAT8},
            "sparsity_config": {"format": "sparse-24-bitmask"},
        },
        "compressed-tensors, 8-bit",
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_quantised_models_are_called_by_their_method(method, llamas, models):
    settings, said = METHODS[method]
    folder = models.copy(llamas[0], f"quantised-{method.replace(' ', '2')}")
    edit_config(folder, quantization_config={"quant_method": method, **settings})
    found = refusal(folder)
    assert f"is quantised ({said}" in found or said in found
    assert "Use the 16-bit original." in found
    (folder / "README.md").write_text("---\nbase_model:\n- acme/Original-7B\n---\n# x\n")
    assert "16-bit original, which its card names: acme/Original-7B." in refusal(folder)


@pytest.mark.parametrize(
    ("name", "dtype", "said"),
    [
        ("mlp.up_proj.qweight", "int32", "GPTQ or AWQ"),
        ("mlp.up_proj.qzeros", "int32", "GPTQ or AWQ"),
        ("mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "uint8", "bitsandbytes"),
        ("mlp.up_proj.weight_packed", "int32", "compressed-tensors"),
        ("mlp.experts.gate_up_proj_blocks", "uint8", "mxfp4"),
        ("mlp.up_proj.codes", "int8", "AQLM"),
        ("mlp.up_proj.W_q", "uint8", "HQQ"),
    ],
)
def test_packed_integers_are_refused_without_a_config_that_says_so(name, dtype, said):
    source = held({name: spec(dtype, 4, 4)})
    with pytest.raises(SourceError, match=said) as caught:
        from_source(source)
    assert f"acme is quantised: it has {name} ({dtype} [4, 4]" in str(caught.value)


@pytest.mark.parametrize("end", ["_scale", "_scale_inv"])
def test_integers_with_scales_are_refused(end):
    with pytest.raises(SourceError, match="integers with scales"):
        from_source(held({"x.weight": spec("int8", 4, 4), f"x.weight{end}": spec("float32", 4, 1)}))


def test_gguf_beside_a_config_is_named(llamas, tmp_path):
    (tmp_path / "config.json").write_bytes((llamas[0] / "config.json").read_bytes())
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    (tmp_path / "README.md").write_text("---\nbase_model: acme/Original-7B\n---\n")
    assert "GGUF" in refusal(tmp_path)
    assert "Use the original checkpoint, which its card names: acme/Original-7B." in refusal(
        tmp_path
    )
    assert "is a GGUF file" in refusal(tmp_path / "model-q4.gguf")


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_is_written_behind_its_base(with_config, llamas, tmp_path):
    settings = {"base_model_name_or_path": "acme/Base-7B"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    if with_config:
        (tmp_path / "config.json").write_bytes((llamas[0] / "config.json").read_bytes())
    found = refusal(tmp_path)
    assert "is an adapter for acme/Base-7B, not a model" in found
    assert f'Write "acme/Base-7B+{tmp_path}".' in found


# --- mixtures and mixed dtypes -------------------------------------------------------------------

EXPERTS = {
    "mixtral": {"num_local_experts": 3},
    "qwen2_moe": {"num_experts": 3, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 3, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 3},
}


@pytest.mark.parametrize("family", EXPERTS)
def test_mixtures_are_merged_under_their_names_on_disk(family, models, tmp_path):
    folders = [models(family, seed=seed, **EXPERTS[family]) for seed in (1, 2)]
    moeforge.build(linear(*folders), tmp_path / "out")
    inputs = [load_file(folder / SAFE) for folder in folders]
    result = load_file(tmp_path / "out" / SAFE)
    assert result.keys() == inputs[0].keys()
    assert family == "granitemoe" or any(".experts.2." in name for name in result)
    for name, tensor in result.items():
        expected = weighted_mean([tensors[name] for tensors in inputs])
        assert (tensor.double() - expected).abs().max() <= 1e-6 * expected.abs().max(), name
    _, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert not told["mismatched_keys"]


def test_inputs_of_several_dtypes_are_merged_in_the_widest(models, tmp_path):
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    folders = [models("llama", seed=seed, dtype=dtype) for seed, dtype in enumerate(dtypes)]
    moeforge.build(linear(*folders), tmp_path / "out")
    inputs = [load_file(folder / SAFE) for folder in folders]
    assert [tensors[UP].dtype for tensors in inputs] == list(dtypes)
    for name, tensor in load_file(tmp_path / "out" / SAFE).items():
        expected = weighted_mean([tensors[name] for tensors in inputs])
        assert tensor.dtype == torch.float32
        assert (tensor.double() - expected).abs().max() <= 1e-6 * expected.abs().max(), name

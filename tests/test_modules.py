"""Models of several modules: towers merged, stacked and kept, and what loads afterwards.

The names of modules are those of mergekit's architecture definitions.
"""

import json
import shutil

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import edit_config, randomize
from transformers import AddedToken

import moeforge
from moeforge import forge
from moeforge.errors import PlanError, show_path

TEXT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
VISION |= {"num_attention_heads": 4, "image_size": 28, "patch_size": 14}
QWEN_VISION = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4}
QWEN_VISION |= {"out_hidden_size": 32, "patch_size": 14, "fullatt_block_indexes": [1]}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
CODERS = {"vocab_size": 300, "d_model": 32, "encoder_layers": 3, "decoder_layers": 2}
CODERS |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
CODERS |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}

CASES = {
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
            "image_token_index": 257,
        },
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "mistral", "head_dim": 8},
            "vision_config": {**VISION, "model_type": "pixtral"},
            "image_token_index": 257,
        },
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {
                **TEXT,
                "head_dim": 8,
                "sliding_window": 8,
                "sliding_window_pattern": 2,
            },
            "vision_config": {**VISION, "model_type": "siglip_vision_model"},
            "image_token_index": 257,
            "mm_tokens_per_image": 4,
        },
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {**TEXT, "rope_parameters": ROPE},
            "vision_config": {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 4},
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {"text_config": {**TEXT, "rope_parameters": ROPE}, "vision_config": QWEN_VISION}
        | {f"{kind}_token_id": 256 for kind in ("image", "video", "vision_start", "vision_end")},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3}
        | {"num_decoder_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    ),
    "bart": ("BartForConditionalGeneration", CODERS),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**CODERS, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    ),
}
IN_TWO = ["llava", "mistral3", "gemma3", "qwen2_vl", "qwen2_5_vl"]
CODING = ["t5", "bart", "whisper"]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """`make("llava", 1)` -> folder of a tiny model, made once."""
    root = tmp_path_factory.mktemp("modules")

    def made(name, seed):
        folder = root / f"{name}{seed}"
        if not folder.exists():
            architecture, config = CASES[name]
            model_class = getattr(transformers, architecture)
            torch.manual_seed(0)
            model = model_class(model_class.config_class(**config))
            randomize(model, seed)
            model.save_pretrained(folder)
        return folder

    return made


@pytest.fixture
def pair(make):
    """`pair("llava")` -> folders of two models that differ in every parameter."""
    return lambda name: [make(name, 1), make(name, 2)]


def entries(folders, *weights):
    return [
        {"model": str(folder), "parameters": {"weight": weight}}
        for folder, weight in zip(folders, weights, strict=True)
    ]


def part(folder, start, end, **more):
    return {"sources": [{"model": str(folder), "layer_range": [start, end]}], **more}


def built(recipe, out, name):
    """Build and reload a model; return its tensors and config.

    It has all keys and no others, and its logits are finite.
    """
    moeforge.build(recipe, out)
    model_class = getattr(transformers, CASES[name][0])
    model, info = model_class.from_pretrained(out, output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    ids = torch.arange(1, 9)[None]
    given = {"input_ids": ids}
    if name in CODING:
        given["decoder_input_ids"] = ids
    if name == "whisper":
        given["input_features"] = torch.ones(1, 8, 40)
        del given["input_ids"]
    with torch.no_grad():
        assert model(**given).logits.isfinite().all()
    return load_file(out / "model.safetensors"), model.config


def tensors_of(folders):
    return [load_file(folder / "model.safetensors") for folder in folders]


# --- which is which ------------------------------------------------------------------------------

NAMES = {
    "llava": {
        "language_model.model.embed_tokens.weight": "text_decoder",
        "language_model.lm_head.weight": "text_decoder",
        "vision_tower.encoder.layers.0.mlp.fc1.weight": "vision_tower",
        "multi_modal_projector.linear_1.weight": "multi_modal_projector",
    },
    "gemma3": {
        "language_model.model.norm.weight": "text_decoder",
        "multi_modal_projector.mm_soft_emb_norm.weight": "multi_modal_projector",
        "vision_tower.post_layernorm.weight": "vision_tower",
    },
    "qwen2_5_vl": {
        "lm_head.weight": "text_decoder",
        "model.layers.1.mlp.up_proj.weight": "text_decoder",
        "visual.merger.ln_q.weight": "multi_modal_projector",
        "visual.blocks.2.norm1.weight": "vision_tower",
        "visual.patch_embed.proj.weight": "vision_tower",
    },
    "t5": {
        "shared.weight": "shared",
        "encoder.block.0.layer.0.SelfAttention.k.weight": "encoder",
        "decoder.final_layer_norm.weight": "decoder",
    },
    "whisper": {
        "model.encoder.conv1.weight": "encoder",
        "model.decoder.embed_tokens.weight": "decoder",
    },
}
"""Tensors as they lie on disk, and the module that mergekit's definitions have them in."""


@pytest.mark.parametrize("name", NAMES)
def test_modules_have_mergekits_tensors(name, pair):
    """Weight 0 or 1 for each module in turn: the tensors that change are the module's."""
    folders = pair(name)
    for module in set(NAMES[name].values()):
        recipe = {
            "merge_method": "task_arithmetic",
            "base_model": str(folders[0]),
            "modules": {module: {"models": entries(folders[1:], 1)}},
        }
        plan = forge.plan(recipe)
        changed = {t.name: bool(getattr(t.expr, "inputs", ())) for t in plan.tensors}
        for tensor, owner in NAMES[name].items():
            assert changed[tensor] == (owner == module), tensor


def test_both_layouts_on_disk_are_known(make, tmp_path):
    """transformers 5 names its own parameters `model.language_model.…`; some files do as well."""
    folders = []
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        shutil.copytree(make("llava", seed), folder)
        model = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
        save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
        folders.append(folder)
    module = {"slices": [part(folders[0], 0, 3), part(folders[1], 1, 4)]}
    recipe = {"merge_method": "passthrough", "modules": {"text_decoder": module}}
    result, config = built(recipe, tmp_path / "out", "llava")
    assert config.text_config.num_hidden_layers == 6
    a, b = tensors_of(folders)
    name = "model.language_model.layers.{}.mlp.up_proj.weight"
    assert result[name.format(3)].equal(b[name.format(1)])
    kept = [name for name in a if ".language_model." not in name and name != "lm_head.weight"]
    assert len(kept) > 40
    assert all(result[name].equal(a[name]) for name in kept)


# --- whole models --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_whole_models_are_merged_tensor_by_tensor(name, pair, tmp_path):
    folders = pair(name)
    recipe = {"merge_method": "linear", "models": entries(folders, 1, 3)}
    result, config = built(recipe, tmp_path / "out", name)
    a, b = tensors_of(folders)
    assert result.keys() == a.keys()
    for key, value in result.items():
        expected = (a[key].double() + 3 * b[key].double()) / 4
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
    theirs, mine = (
        type(config).from_pretrained(folder).to_dict() for folder in (folders[0], tmp_path / "out")
    )
    differing = {key for key in mine | theirs if mine.get(key) != theirs.get(key)}
    assert differing <= {"_name_or_path"}


@pytest.mark.parametrize("depth", [3, 4])
@pytest.mark.parametrize("split", [False, True])
def test_gradients_start_again_in_each_tower(depth, split, make, tmp_path):
    """Also where both towers have as many layers, and whether or not the modules are named."""
    folders = []
    for seed in (1, 2):
        model = transformers.LlavaForConditionalGeneration.from_pretrained(make("llava", seed))
        model.model.language_model.layers = model.model.language_model.layers[:depth]
        model.config.text_config.num_hidden_layers = depth
        folders.append(tmp_path / str(seed))
        model.save_pretrained(folders[-1])
    recipe = {"merge_method": "slerp", "base_model": str(folders[0]), "parameters": {"t": [0, 1]}}
    inputs = {"models": [{"model": str(folder)} for folder in folders]}
    names = ("text_decoder", "vision_tower", "multi_modal_projector")
    recipe |= {"modules": dict.fromkeys(names, inputs)} if split else inputs
    found = {t.name: dict(t.expr.params)["t"] for t in forge.plan(recipe).tensors}
    for stem, count in (("language_model.model.", depth), ("vision_tower.encoder.", 3)):
        for i in range(count):
            (t,) = {t for name, t in found.items() if name.startswith(f"{stem}layers.{i}.")}
            assert t == pytest.approx(i / (count - 1))
    outside = {t for name, t in found.items() if ".layers." not in name}
    assert outside == {0}


# --- modules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IN_TWO)
def test_one_module_is_merged_and_the_others_are_the_bases(name, pair, tmp_path):
    folders = pair(name)
    module = {"models": entries(folders, 1, 3)}
    recipe = {
        "merge_method": "linear",
        "base_model": str(folders[1]),
        "modules": {"text_decoder": module},
    }
    notes = [note.what for note in forge.check(recipe).notes]
    result, _ = built(recipe, tmp_path / "out", name)
    a, b = tensors_of(folders)
    assert result.keys() == a.keys()
    seen = set()
    for key, value in result.items():
        text = "language_model" in key or key.startswith(("model.", "lm_head"))
        seen.add(text)
        expected = (a[key].double() + 3 * b[key].double()) / 4 if text else b[key].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
    assert seen == {True, False}
    for module in ("multi_modal_projector", "vision_tower"):
        assert f"module {module} is not in the recipe: it comes from {folders[1]}" in notes


@pytest.mark.parametrize("name", IN_TWO)
def test_the_text_decoder_is_stacked(name, pair, tmp_path):
    folders = pair(name)
    parts = [part(folders[0], 0, 3), part(folders[1], 2, 4), part(folders[0], 3, 4)]
    recipe = {"merge_method": "passthrough", "modules": {"text_decoder": {"slices": parts}}}
    result, config = built(recipe, tmp_path / "out", name)
    a, b = tensors_of(folders)
    stem = next(key for key in a if ".layers.3." in key and "vision" not in key)
    stem = stem[: stem.index("layers.3.")] + "layers."
    assert config.text_config.num_hidden_layers == 6
    for new, (theirs, old) in enumerate([(a, 0), (a, 1), (a, 2), (b, 2), (b, 3), (a, 3)]):
        keys = [key for key in result if key.startswith(f"{stem}{new}.")]
        assert len(keys) >= 9
        origin = [theirs[key.replace(f"{stem}{new}.", f"{stem}{old}.")] for key in keys]
        assert all(result[key].equal(value) for key, value in zip(keys, origin, strict=True))
    outside = [key for key in result if not key.startswith(stem)]
    assert all(result[key].equal(a[key]) for key in outside), "the last slice is of the first model"
    if name == "gemma3":
        local, full = "sliding_attention", "full_attention"
        assert config.text_config.layer_types == [local, full, local, local, full, full]


@pytest.mark.parametrize("name", ["llava", "mistral3", "qwen2_5_vl"])
def test_the_vision_tower_is_stacked(name, pair, tmp_path):
    """What makes patches is the first slice's, what follows the layers the last slice's."""
    folders = pair(name)
    parts = [part(folders[0], 0, 2), part(folders[1], 1, 3)]
    modules = {"vision_tower": {"slices": parts}}
    result, config = built(
        {"merge_method": "passthrough", "modules": modules}, tmp_path / "o", name
    )
    a, b = tensors_of(folders)
    vision = config.vision_config
    assert (vision.depth if name == "qwen2_5_vl" else vision.num_hidden_layers) == 4
    if name == "qwen2_5_vl":
        assert vision.fullatt_block_indexes == [1, 2], "layer 1 of either model"
    first = {
        "llava": ("vision_tower.pre_layrnorm.weight", "vision_tower.embeddings.class_embedding"),
        "mistral3": ("vision_tower.ln_pre.weight", "vision_tower.patch_conv.weight"),
        "qwen2_5_vl": ("visual.patch_embed.proj.weight",),
    }[name]
    assert all(result[key].equal(a[key]) for key in first)
    if name == "llava":
        assert result["vision_tower.post_layernorm.weight"].equal(
            b["vision_tower.post_layernorm.weight"]
        )


@pytest.mark.parametrize("name", CODING)
@pytest.mark.parametrize("module", ["encoder", "decoder"])
def test_encoders_and_decoders_are_stacked(name, module, pair, tmp_path):
    folders = pair(name)
    depth = {"encoder": 3, "decoder": 2}[module]
    parts = [part(folders[0], 1, depth), part(folders[1], 0, depth)]
    recipe = {"merge_method": "passthrough", "modules": {module: {"slices": parts}}}
    result, config = built(recipe, tmp_path / "out", name)
    a, b = tensors_of(folders)
    depths = {"encoder": 3, "decoder": 2, module: 2 * depth - 1}
    keys = ("num_layers", "num_decoder_layers") if name == "t5" else None
    keys = keys or ("encoder_layers", "decoder_layers")
    assert [getattr(config, key) for key in keys] == list(depths.values())
    stem = f"{'' if name == 't5' else 'model.'}{module}.{'block' if name == 't5' else 'layers'}."
    last = [key for key in a if key.startswith(f"{stem}{depth - 1}.")]
    assert len(last) > 7
    for key in last:
        new = key.replace(f"{stem}{depth - 1}.", f"{stem}{2 * depth - 2}.")
        assert result[new].equal(b[key])
    other = {"encoder": "decoder", "decoder": "encoder"}[module]
    kept = [key for key in a if key.removeprefix("model.").startswith(other)]
    assert len(kept) > 20
    assert all(result[key].equal(a[key]) for key in kept)
    table = f"{module}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    if name == "t5":  # the table serves all layers: it stays in the first, whichever that is
        assert result[table].equal(a[table])


def test_the_flat_config_of_published_qwen2_vl_follows(make, pair, tmp_path):
    """There the text decoder's settings are the model's own."""
    folders = []
    for original in pair("qwen2_vl"):
        folder = tmp_path / original.name
        shutil.copytree(original, folder)
        config = json.loads((folder / "config.json").read_text())
        text = config.pop("text_config")
        text.pop("model_type")
        (folder / "config.json").write_text(json.dumps({**text, **config}))
        folders.append(folder)
    parts = [part(folders[0], 0, 3), part(folders[1], 1, 4)]
    modules = {"text_decoder": {"slices": parts}}
    recipe = {"merge_method": "passthrough", "modules": modules}
    _, config = built(recipe, tmp_path / "out", "qwen2_vl")
    assert config.text_config.num_hidden_layers == 6
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["num_hidden_layers"] == 6


# --- parameters ----------------------------------------------------------------------------------


def test_source_goes_before_slice_before_module_before_recipe(pair):
    folders = pair("llava")
    both = [{"model": str(folder), "layer_range": [0, 1]} for folder in folders]
    slices = [
        {
            "sources": [{**both[0], "parameters": {"weight": 1}}, both[1]],
            "parameters": {"weight": 2},
        },
        {"sources": both},
    ]
    recipe = {
        "merge_method": "linear",
        "base_model": str(folders[0]),
        "parameters": {"weight": 4, "normalize": False},
        "modules": {
            "text_decoder": {"slices": slices, "parameters": {"weight": 3}},
            "vision_tower": {"models": [{"model": str(f)} for f in folders]},
            "multi_modal_projector": {
                "models": [{"model": str(f)} for f in folders],
                "parameters": {"normalize": True, "weight": [{"filter": "bias", "value": 5}]},
            },
        },
    }
    found = {t.name: dict(t.expr.params) for t in forge.plan(recipe).tensors}
    up = "language_model.model.layers.{}.mlp.up_proj.weight"
    assert found[up.format(0)] == {"weight": (1, 2), "normalize": False}
    assert found[up.format(1)]["weight"] == (3, 3)
    assert found["vision_tower.post_layernorm.weight"]["weight"] == (4, 4)
    projector = "multi_modal_projector.linear_1."
    assert found[f"{projector}bias"] == {"weight": (5, 5), "normalize": True}
    assert found[f"{projector}weight"]["weight"] == (4, 4)


def test_parameters_of_the_whole_recipe_are_checked(pair):
    folders = pair("llava")
    names = ("text_decoder", "vision_tower")
    recipe = {
        "merge_method": "linear",
        "modules": {name: {"models": entries(folders, 1, 1)} for name in names},
    }
    wrong = forge.check({**recipe, "parameters": {"normalise": False, "t": 1}})
    assert [show_path(f.path) for f in wrong.errors] == ["$.parameters.normalise"]
    assert 'did you mean "normalize"?' in wrong.errors[0].what
    filters = [{"filter": word, "value": False} for word in ("vision_tower", "visoin", "mlp")]
    missed = forge.check({**recipe, "parameters": {"normalize": filters}})
    assert [f.what for f in missed.errors] == ['filter "visoin" decides no tensor']


# --- the rest ------------------------------------------------------------------------------------


def test_unknown_modules_are_named(pair):
    folders = pair("llava")
    module = {"models": entries(folders, 1, 1)}
    recipe = {"merge_method": "linear", "modules": {"text_decodr": module, "default": module}}
    near, far = forge.check(recipe).errors
    assert show_path(near.path) == "$.modules.text_decodr"
    assert 'did you mean "text_decoder"?' in near.what
    assert far.fix == "It has multi_modal_projector, text_decoder, vision_tower."


@pytest.mark.parametrize("name", ["llava", "bart"])
def test_slices_without_a_module_are_refused_with_a_way_out(name, pair):
    folders = pair(name)
    with pytest.raises(PlanError, match=r"modules: \{NAME: \{slices: …\}\}"):
        forge.plan({"slices": [part(folders[0], 0, 2)]})


def test_two_towers_of_one_depth_are_not_mistaken_for_each_other(make, tmp_path):
    folder = tmp_path / "t5"
    shutil.copytree(make("t5", 1), folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in tensors.items() if "encoder.block.2." not in key}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, num_layers=2)
    with pytest.raises(PlanError, match="no numbered layers"):
        forge.plan({"slices": [part(folder, 0, 2)]})


def test_dtype_holds_for_every_module(pair, tmp_path):
    folders = pair("llava")
    recipe = {
        "merge_method": "linear",
        "dtype": "bfloat16",
        "modules": {"text_decoder": {"models": entries(folders, 1, 3)}},
    }
    result, config = built(recipe, tmp_path / "out", "llava")
    assert {value.dtype for value in result.values()} == {torch.bfloat16}
    assert config.dtype == torch.bfloat16


def with_tokenizer(folder, target, *more):
    shutil.copytree(folder, target)
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([AddedToken(token) for token in more])
    tokenizer.save_pretrained(target)
    return target


@pytest.mark.parametrize("listed", [["text_decoder"], ["text_decoder", "vision_tower"], []])
@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_a_tokenizer_for_all_modules(kind, listed, pair, tmp_path):
    """Rows are those of the result's tokens, whether their module is merged or the base's own."""
    first, second = pair(kind)
    a = with_tokenizer(first, tmp_path / "a")
    b = with_tokenizer(second, tmp_path / "b", "<new>", "<other>")
    module = {"models": entries([a, b], 1, 3)}
    recipe = {
        "merge_method": "linear",
        "base_model": str(a),
        "tokenizer": {"source": "union"},
        "modules": dict.fromkeys(listed or ["vision_tower"], module),
    }
    result, config = built(recipe, tmp_path / "out", kind)
    assert config.text_config.vocab_size == 260, "258 of the base, 2 of the other"
    name = next(key for key in result if key.endswith("embed_tokens.weight"))
    mine, theirs = (tensors[name].double() for tensors in tensors_of([a, b]))
    expected = mine[:258]
    if "text_decoder" in listed:
        expected = (mine[:258] + 3 * theirs[:258]) / 4
    assert result[name].shape[0] == 260
    torch.testing.assert_close(result[name][:258].double(), expected, rtol=1e-6, atol=1e-7)
    added = result[name][258:].double()
    # Merged, the base takes the other's row for a token it lacks; alone it has zeros.
    wanted = theirs[258:260] if "text_decoder" in listed else torch.zeros_like(added)
    torch.testing.assert_close(added, wanted, rtol=1e-6, atol=1e-7)


def test_the_image_token_is_the_same_token_afterwards(pair, tmp_path):
    """LLaVA calls its id `image_token_index`; here it is 258 in one model and 259 in the other."""
    first, second = pair("llava")
    a = with_tokenizer(first, tmp_path / "a", "<image>")
    b = with_tokenizer(second, tmp_path / "b", "<new>", "<image>")
    edit_config(a, image_token_index=258)
    tokenizer = {"source": str(b)}
    recipe = {"merge_method": "linear", "models": entries([a, b], 1, 1), "tokenizer": tokenizer}
    assert forge.plan(recipe).config["image_token_index"] == 259

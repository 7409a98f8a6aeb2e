"""Stacks of every decoder family in transformers: exact, or refused with the reason.

The proof of a family, with two tiny random models: every layer of the stack has the weights of the
layer that it comes from, computes the same from the same inputs, and is given the same masks and
positions; the cache changes nothing; and a stack of all layers is the model.
"""

from __future__ import annotations

import copy
import json

import pytest
import stack_table
import torch
from safetensors.torch import load_file, save_file
from stack_table import origins, recipe
from tiny import LAYERS, SHAPE, edit_config
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Qwen3VLConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from zoo import SKIP, ZOO

import moeforge
from moeforge import forge
from moeforge.errors import PlanError
from moeforge.planners import layer_lists, layer_proof
from moeforge.plans import Read
from moeforge.proof.heldout import load_output

SLICES = stack_table.STACKS["middle repeated"]
REFUSED = {
    "beam": "attn_residual_add_idx",
    "diffllama": "lambda_init",
    "gemma3n_text": "num_kv_shared_layers",
    "gemma4_text": "embed_tokens_per_layer.*grows with the number of layers",
    "hrm_text": "no numbered layers",
    "inkling2_text": "attn_queries. is numbered like its layers",
    "zamba": "is shared with",
    "zamba2": "is shared with",
}
"""Families no stack of which is exact here, and the words of the reason."""


def tower(model):
    """The list of decoder layers: the largest that lies in no other list."""
    found = []

    def look(module):
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                found.append(child)
            else:
                look(child)

    look(model)
    return max(found, key=len)


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in tensors(each)]
    if isinstance(value, dict):
        return [tensor for each in value.values() for tensor in tensors(each)]
    return []


def load(folder):
    """The model, with weights aligned in memory: products may round differently where they lie."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


@torch.no_grad()
def calls(model, ids):
    """How the model calls each of its layers."""
    made = []

    def note(layer, args, kwargs):
        made.append((copy.deepcopy(args), copy.deepcopy(kwargs)))

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in tower(model)]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return made


def surroundings(call):
    """What a layer is given apart from hidden states: masks and positions."""
    kwargs = call[1]
    return [
        tensor
        for name in sorted(kwargs)
        if "mask" in name or "position" in name
        for tensor in tensors(kwargs[name])
    ]


def equal(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


@torch.no_grad()
def assert_layers_are_theirs(stack, sources, where, ids):
    asked = [calls(source, ids) for source in sources]
    for number, (call, (model, layer)) in enumerate(zip(calls(stack, ids), where, strict=True)):
        mine, theirs = tower(stack)[number], tower(sources[model])[layer]
        weights = theirs.state_dict()
        assert mine.state_dict().keys() == weights.keys()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in mine.state_dict().items())
        assert equal(surroundings(call), surroundings(asked[model][layer])), number
        outputs = [
            tensors(module(*copy.deepcopy(call[0]), **copy.deepcopy(call[1])))
            for module in (mine, theirs)
        ]
        assert outputs[0]
        assert equal(*outputs), number


def assert_cache_changes_nothing(model, ids):
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(ids, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))


FAMILIES = [kind for kind in ZOO if kind not in REFUSED]


def plan(folders, slices=SLICES):
    return forge.plan(recipe(folders, slices))


def test_every_type_of_the_mapping_is_in_the_zoo_or_skipped_with_a_reason():
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) == ZOO.keys() | SKIP.keys()
    assert not ZOO.keys() & SKIP.keys()
    assert all(SKIP.values())


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_layer_is_the_one_it_comes_from(kind, models, tmp_path):
    folders = [stack_table.checkpoint(models, kind, seed) for seed in (1, 2)]
    assert_stack_is_exact(folders, SLICES, tmp_path / "out")


def assert_stack_is_exact(folders, slices, out):
    moeforge.build(recipe(folders, slices), out)
    sources = list(map(load, folders))
    load_output(out)  # nothing missing, nothing left over
    stack = load(out)
    ids = torch.arange(40)[None] % 256
    where = origins(slices)
    assert len(tower(stack)) == len(where)
    assert_layers_are_theirs(stack, sources, where, ids)
    everything = [layer_lists.lists(source.config) for source in sources]
    for name in everything[0]:
        if name != "kv_sharing_modes":  # a layer may become one more whose values are read
            expected = [everything[model][name][layer] for model, layer in where]
            assert layer_lists.lists(stack.config)[name] == expected, name
    assert bool(stack(input_ids=ids).logits.isfinite().all())
    if hasattr(stack.config, "index_topk"):
        # What transformers selects for indexed attention differs with the cache: let it select all.
        edit_config(out, index_topk=64)
        stack = load(out)
    assert_cache_changes_nothing(stack, ids)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_stack_of_all_layers_is_the_model(kind, models, tmp_path):
    folder = stack_table.checkpoint(models, kind, 1)
    # Whether such an output passes its checks, the test above has seen.
    moeforge.build(recipe([folder], [(0, 0, 2), (0, 2, 4)]), tmp_path / "out", verify=False)
    ids = torch.arange(40)[None] % 256
    expected = load(folder)(input_ids=ids).logits
    assert torch.equal(load(tmp_path / "out")(input_ids=ids).logits, expected)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_exact_is_refused(kind, models):
    folders = [stack_table.checkpoint(models, kind, seed) for seed in (1, 2)]
    with pytest.raises(PlanError, match=REFUSED[kind]):
        plan(folders)


def test_the_table_in_the_docs_is_what_is_planned(models):
    assert stack_table.table(models) in stack_table.PAGE.read_text(), (
        "run: python tests/stack_table.py"
    )


# --- families that are taken as uniform ----------------------------------------------------------


@pytest.mark.parametrize("kind", layer_lists.UNIFORM)
@pytest.mark.parametrize("depth", [4, 6])
def test_uniform_families_are(kind, depth):
    settings = {**SHAPE, **ZOO[kind], "use_sliding_window": False}
    first, *others = (
        layer
        for layers in (LAYERS, depth)
        for layer in layer_proof.facts(raw(kind, {**settings, "num_hidden_layers": layers}))[0]
    )
    assert len(others) == LAYERS + depth - 1
    for layer in others:
        assert layer.keys() == first.keys()
        assert all(layer_proof.same(layer[path], first[path]) for path in layer)
    for values in layer_lists.lists(CONFIG_MAPPING[kind](**settings)).values():
        assert len(set(values)) == 1


def raw(kind, settings):
    return json.loads(CONFIG_MAPPING[kind](**settings).to_json_string())


# --- what is derived is written ------------------------------------------------------------------

DERIVED = {
    "afmoe": {"global_attn_every_n_layers": 2},
    "cohere2": {"sliding_window_pattern": 2},
    "exaone4": {"sliding_window_pattern": 2},
    "gemma2": {},
    "gemma3_text": {"sliding_window_pattern": 2},
    "gpt_oss": {},
    "lfm2": {"full_attn_idxs": [0, 3]},
    "llama4_text": {"no_rope_layer_interval": 2},
    "modernbert-decoder": {"global_attn_every_n_layers": 2},
    "olmo3": {},
    "qwen2": {},
    "qwen3_next": {"full_attention_interval": 2},
    "smollm3": {"no_rope_layer_interval": 2},
}
_LISTS = ("layer_types", "no_rope_layers", "moe_layers")


@pytest.mark.parametrize("kind", DERIVED)
def test_configs_of_older_exports_get_the_lists_written(kind, models, tmp_path):
    """They name an interval, or nothing, and the family counts layers."""
    original = models(kind, seed=1, with_tokenizer=False, **ZOO[kind])
    folder = models.copy(original, f"bare-{kind}")
    edit_config(folder, **dict.fromkeys(_LISTS), **DERIVED[kind])
    config = json.loads((folder / "config.json").read_text())
    known = layer_lists.lists(CONFIG_MAPPING[kind].from_dict(config))
    made = plan([folder], [(0, 0, 3), (0, 1, 4)]).config
    theirs = layer_lists.lists(CONFIG_MAPPING[kind].from_dict(dict(made)))
    assert any(len(set(values)) == 2 for values in known.values())
    for name, values in known.items():
        assert theirs[name] == [values[layer] for layer in (0, 1, 2, 1, 2, 3)], name


def test_moe_layers_counted_by_steps_become_a_list_of_dense_ones(models):
    folder = models("qwen3_moe", with_tokenizer=False, **ZOO["qwen3_moe"])
    made = plan([folder], [(0, 0, 3), (0, 2, 4)]).config
    assert made["decoder_sparse_step"] == 1
    assert made["mlp_only_layers"] == [0, 2, 3], "layers 1 and 3 are sparse"


def test_minicpm_keeps_its_residual_scale(models):
    """It is scale_depth / sqrt(layers), and the layers become more."""
    folder = models("minicpm3", with_tokenizer=False, **ZOO["minicpm3"])
    made = plan([folder], [(0, 0, 4), (0, 0, 3)]).config
    assert made["scale_depth"] / 7**0.5 == 1.4 / 4**0.5


def test_windows_of_qwen_count_their_layers_where_they_can(models):
    folder = models("qwen2", with_tokenizer=False, **ZOO["qwen2"])
    assert plan([folder], [(0, 0, 2), (0, 1, 4)]).config["max_window_layers"] == 3


# --- where a family has one way only -------------------------------------------------------------

FIXED = [
    ("deepseek_v3", [(0, 0, 2), (0, 0, 2)], '"first_k_dense_replace".*layer 2.*layer 0 of'),
    ("afmoe", [(0, 0, 2), (0, 0, 2)], '"num_dense_layers".*layer 2'),
    (
        "jamba",
        [(0, 0, 2), (0, 0, 1), (0, 0, 2), (0, 1, 2)],
        '"attn_layer_period".*no period and offset',
    ),
    ("ernie4_5_moe", [(0, 1, 3), (0, 0, 1), (0, 3, 4)], '"moe_layer_start_index"'),
    ("modernbert-decoder", [(0, 1, 4)], "layer 0 of the stack would have .*attn_norm"),
    ("rwkv", [(0, 1, 4)], "layer 0 of the stack would have pre_ln"),
    ("zaya", [(0, 1, 4)], "layer 0 of the stack would have .*router_states_scale"),
    ("gpt_neox_japanese", [(0, 0, 3)], "layer 2 of the stack would have .*dense_bias"),
    ("hy_v4", [(0, 2, 4)], '"indexer_types".*the layer before it'),
    ("qwen4_exp_text", [(0, 0, 1), (0, 0, 4)], "ple_layer_index|hash|head_offsets"),
]


@pytest.mark.parametrize(("kind", "slices", "reason"), FIXED, ids=[case[0] for case in FIXED])
def test_patterns_that_a_family_cannot_say_are_refused(kind, slices, reason, models):
    folder = models(kind, with_tokenizer=False, **ZOO[kind])
    with pytest.raises(PlanError, match=reason):
        plan([folder], slices)


def test_gpt2_that_scales_attention_by_layer_numbers_is_refused(models):
    folder = models("gpt2", with_tokenizer=False, scale_attn_by_inverse_layer_idx=True)
    assert plan([folder], [(0, 0, 2)]), "the first layers keep their numbers"
    with pytest.raises(PlanError, match=r"attn\.scaling"):
        plan([folder], [(0, 0, 3), (0, 1, 4)])


PLAIN_GEMMA4 = {**ZOO["gemma4_text"], "hidden_size_per_layer_input": 0}


def test_gemma4_without_embeddings_per_layer_stacks(models, tmp_path):
    folders = [models("gemma4_text", seed, with_tokenizer=False, **PLAIN_GEMMA4) for seed in (1, 2)]
    assert_stack_is_exact(folders, SLICES, tmp_path / "out")


def test_layers_that_share_keys_and_values_stay_at_the_end(models, tmp_path):
    settings = {**ZOO["gemma4_unified_text"], "num_kv_shared_layers": 2}
    settings["layer_types"] = ZOO["gemma4_text"]["layer_types"]
    folder = models("gemma4_unified_text", with_tokenizer=False, **settings)
    made = plan([folder], [(0, 0, 4), (0, 2, 4)])
    assert made.config["num_kv_shared_layers"] == 4
    assert_stack_is_exact([folder], [(0, 0, 4), (0, 2, 4)], tmp_path / "out")
    with pytest.raises(PlanError, match='"num_kv_shared_layers" cannot say what layer 2'):
        plan([folder], [(0, 0, 3), (0, 0, 4)])
    with pytest.raises(PlanError, match='"kv_sharing_modes" of layer 0 of the stack'):
        plan([folder], [(0, 0, 2), (0, 0, 4)])


def test_layers_that_predict_further_tokens_are_left_out(models):
    """DeepSeek-V3 and GLM-4.5 number them after the last layer; transformers does not load them."""
    original = models("deepseek_v3", with_tokenizer=False, **ZOO["deepseek_v3"])
    folder = models.copy(original, "predicting")
    tensors = load_file(folder / "model.safetensors")
    last = {n: t for n, t in tensors.items() if n.startswith("model.layers.3.")}
    more = {n.replace("layers.3.", "layers.4."): t.clone() for n, t in last.items()}
    save_file({**tensors, **more}, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, num_nextn_predict_layers=1)
    made = plan([folder], [(0, 0, 3), (0, 1, 4)])
    assert made.config["num_nextn_predict_layers"] == 0
    beyond = {read for read in made.left_out if "layers.4." in read.name}
    assert beyond == {Read(str(folder), name) for name in more}
    assert max(int(t.name.split(".")[2]) for t in made.tensors if ".layers." in t.name) == 5
    with pytest.raises(PlanError, match="has 4 layers"):
        plan([folder], [(0, 0, 5)])


# --- towers --------------------------------------------------------------------------------------


@pytest.fixture
def seeing(tmp_path):
    """A Qwen3-VL of four text and four vision layers, one of which the text looks at."""
    text = {**SHAPE, "head_dim": 16, "pad_token_id": 0}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [4, 2, 2],
    }
    vision = {"hidden_size": 32, "depth": 4, "num_heads": 2, "intermediate_size": 48}
    vision |= {"out_hidden_size": 64, "deepstack_visual_indexes": [2], "patch_size": 4}
    from transformers import AutoModelForImageTextToText

    config = Qwen3VLConfig(text_config=text, vision_config=vision)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "seeing")
    return tmp_path / "seeing"


def tower_of(folder, module, *ranges):
    slices = recipe([folder], [(0, *each) for each in ranges])["slices"]
    return {"merge_method": "passthrough", "modules": {module: {"slices": slices}}}


def test_text_layers_that_images_reach_stay_where_they_are(seeing):
    made = forge.plan(tower_of(seeing, "text_decoder", (0, 3), (1, 4))).config
    assert made["text_config"]["num_hidden_layers"] == 6
    with pytest.raises(PlanError, match="features of images to its first 1 text layers"):
        forge.plan(tower_of(seeing, "text_decoder", (1, 4)))


def test_vision_layers_that_the_text_looks_at_follow(seeing):
    made = forge.plan(tower_of(seeing, "vision_tower", (0, 2), (1, 4))).config
    assert made["vision_config"]["deepstack_visual_indexes"] == [3]
    with pytest.raises(PlanError, match=r'"deepstack_visual_indexes".*needed once'):
        forge.plan(tower_of(seeing, "vision_tower", (0, 3), (2, 4)))


# --- the net -------------------------------------------------------------------------------------


def test_a_rule_that_nobody_knows_is_refused(models, monkeypatch):
    """A family that will multiply by something that depends on the layer's number."""
    from transformers.models.gemma2 import modeling_gemma2

    folder = models("gemma2", with_tokenizer=False, **ZOO["gemma2"])
    build = modeling_gemma2.Gemma2DecoderLayer.__init__

    def damped(self, config, layer_idx):
        build(self, config, layer_idx)
        self.damping = 1 / (layer_idx + 1)

    monkeypatch.setattr(modeling_gemma2.Gemma2DecoderLayer, "__init__", damped)
    assert plan([folder], [(0, 0, 3)])
    with pytest.raises(PlanError, match=r"layer 3 of the stack would have damping 0\.25"):
        plan([folder], [(0, 0, 3), (0, 1, 4)])


def test_layers_of_any_size_are_compared():
    """Experts of terabytes, of which no number is made."""
    settings = {**SHAPE, **ZOO["deepseek_v3"], "n_routed_experts": 512}
    config = raw("deepseek_v3", {**settings, "moe_intermediate_size": 1 << 24})
    layers, _ = layer_proof.facts(config)
    assert layers[1]["mlp.experts.down_proj"] == (512, 64, 1 << 24)


def test_settings_of_whole_models_that_differ_are_noted(models):
    folders = [
        models("gemma2", with_tokenizer=False, **{**ZOO["gemma2"], "rms_norm_eps": eps})
        for eps in (1e-6, 1e-5)
    ]
    notes = [note.what for note in plan(folders).notes]
    assert any("input_layernorm.eps 1e-05 in every layer, the result 1e-06" in n for n in notes)


def test_layers_with_windows_of_another_size_are_refused(models):
    folders = [
        models("gemma2", with_tokenizer=False, **{**ZOO["gemma2"], "sliding_window": size})
        for size in (8, 16)
    ]
    with pytest.raises(
        PlanError, match=r"layer 4 of the stack would have .*sliding_window 8, where"
    ):
        plan(folders)


def test_pruned_and_repeated_layers_can_be_scaled(models, tmp_path):
    """Filters hold for layers of any kind: here recurrent ones."""
    folder = models("qwen3_5_text", with_tokenizer=False, **ZOO["qwen3_5_text"])
    settings = {"scale": [{"filter": "out_proj", "value": 0.5}]}
    asked = {**recipe([folder], [(0, 0, 1), (0, 2, 4), (0, 2, 4)]), "parameters": settings}
    moeforge.build(asked, tmp_path / "out")
    source = load_file(folder / "model.safetensors")
    result = load_file(tmp_path / "out" / "model.safetensors")
    name = "linear_attn.out_proj.weight"
    for new, old in ((0, 0), (1, 2), (3, 2)):
        theirs = source[f"model.layers.{old}.{name}"]
        assert torch.equal(result[f"model.layers.{new}.{name}"], 0.5 * theirs)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    linear, full = "linear_attention", "full_attention"
    assert config["layer_types"] == [linear, linear, full, linear, full]
    assert config["num_hidden_layers"] == LAYERS + 1

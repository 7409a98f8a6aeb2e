"""Taking experts out of mixtures, regrouping them, and making mixtures of one model."""

import json

import pytest
import torch
import yaml
from documented import hold
from safetensors.torch import load_file, save_file
from tiny import SHAPE, WIDE, edit_config, randomize
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner
from zoo import ZOO

import moeforge
from moeforge import families
from moeforge.cli import app
from moeforge.engine import noise
from moeforge.errors import MoeforgeError, PlanError, RecipeError
from moeforge.families._inverse import DENSE, NONE
from moeforge.proof.heldout import load_output

TWO = {"num_hidden_layers": 2}
PLAIN = {"use_sliding_window": False}
VARIANTS = {
    **{
        kind: {**ZOO[kind], **TWO}
        for dense in DENSE.values()
        for kind in (d.model_type for d in dense)
    },
    "qwen2": {**TWO, **PLAIN},
    "qwen3": {**TWO, **PLAIN},
    "qwen3_5_text": {
        **ZOO["qwen3_5_text"],
        **TWO,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "granitemoehybrid": {**ZOO["granitemoehybrid"], **TWO, "layer_types": ["mamba", "attention"]},
    "lfm2": {**ZOO["lfm2"], **TWO, "layer_types": ["conv", "full_attention"]},
    "glm": {**ZOO["glm"], **TWO, "attention_bias": False, "partial_rotary_factor": 0.5},
}
WINDOWS = {**TWO, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
MIXED = {("qwen2_moe", "qwen2"): WINDOWS, ("mellum", "qwen3"): WINDOWS, ("dots1", "qwen3"): WINDOWS}
REWORDED = {
    *("_name_or_path", "head_dim", "max_window_layers", "sliding_window_pattern"),
    *("attention_bias", "pretraining_tp", "sep_token_id", "intermediate_size"),
    *("block_multiple_of", "block_auto_adjust_ff_dim", "dtype"),
}
"""Keys that the result says otherwise, or says though the dense model leaves them to be derived."""
GEMMA = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model.float().eval()(input_ids=IDS, use_cache=False).logits


def dense_logits(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return logits(model)


def mixture(folders, out, **more):
    experts = [{"source_model": str(folder)} for folder in folders]
    recipe = {"base_model": str(folders[0]), "experts": experts, "gate_mode": "random", **more}
    moeforge.build(recipe, out, verify=False)
    return out


def weights(folder):
    return load_file(folder / "model.safetensors")


def mlps(folder):
    stems = (".mlp.", ".feed_forward.", ".shared_mlp.")
    return {name: t for name, t in weights(folder).items() if any(s in name for s in stems)}


CASES = [(name, dense.model_type) for name, every in DENSE.items() for dense in every]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_an_expert_taken_out_is_the_dense_model_that_went_in(name, kind, models, tmp_path):
    """The base is the second expert, so its MLPs must come back with everything around them."""
    variant = MIXED.get((name, kind), VARIANTS[kind])
    first, second = (models(kind, seed=s, with_tokenizer=False, **variant) for s in (1, 2))
    gate = {"base_model": str(second), "architecture": name}
    made = mixture([first, second], tmp_path / "moe", **gate)
    moeforge.extract(made, tmp_path / "out", expert=1, as_type=kind, verify=False)
    back, given = mlps(tmp_path / "out"), mlps(second)
    assert given
    assert back.keys() == given.keys()
    assert all(torch.equal(back[part], given[part]) for part in given)
    assert any(not torch.equal(part, mlps(first)[name]) for name, part in back.items())
    assert (dense_logits(tmp_path / "out") - dense_logits(second)).abs().max() <= 1e-5
    mine, theirs = (AutoConfig.from_pretrained(f).to_dict() for f in (tmp_path / "out", second))
    assert mine["architectures"] == theirs["architectures"]
    assert {key for key in theirs if mine.get(key) != theirs[key]} <= REWORDED


def test_every_family_makes_a_dense_model_or_says_why_not():
    assert {*DENSE, *NONE} == {family.model_type for family in families.shelf()}
    for name, every in DENSE.items():
        for dense in every:
            assert dense.model_type in families.load(name).accepts


@pytest.fixture(scope="module")
def moe(models, tmp_path_factory):
    """A mixture of three llamas and the folders of them."""
    folders = [models("llama", seed=seed, **TWO) for seed in (1, 2, 3)]
    return mixture(folders, tmp_path_factory.mktemp("surgery") / "moe"), folders


def test_the_average_of_experts_is_their_mean(moe, tmp_path):
    folder, folders = moe
    arguments = ["extract", str(folder), "--average", "-o", str(tmp_path / "out"), "--json"]
    hold("extract", json.loads(CliRunner().invoke(app, arguments).stdout))
    made, parts = weights(tmp_path / "out"), [mlps(each) for each in folders]
    for name in parts[0]:
        mean = torch.stack([part[name].double() for part in parts]).mean(0)
        assert (made[name] - mean).abs().max() < 1e-6
    assert torch.equal(made["model.norm.weight"], weights(folders[0])["model.norm.weight"])


def _fused(folder, out):
    """Write a mixture as modules of transformers 5 have it: experts stacked, gate over up."""
    tensors, made = weights(folder), {}
    for layer in range(2):
        stem = f"model.layers.{layer}.block_sparse_moe."
        part = lambda n, w: tensors.pop(f"{stem}experts.{n}.{w}.weight")  # noqa: E731, B023
        ones = [torch.cat([part(n, "w1"), part(n, "w3")]) for n in range(3)]
        made[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack(ones)
        down = torch.stack([part(n, "w2") for n in range(3)])
        made[f"model.layers.{layer}.mlp.experts.down_proj"] = down
        made[f"model.layers.{layer}.mlp.gate.weight"] = tensors.pop(f"{stem}gate.weight")
    out.mkdir()
    save_file({**tensors, **made}, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text((folder / "config.json").read_text())
    return out


def test_stacked_experts_are_found_too(moe, tmp_path):
    folder, folders = moe
    stacked = _fused(folder, tmp_path / "fused")
    moeforge.extract(stacked, tmp_path / "dense", expert=2, verify=False)
    back, given = mlps(tmp_path / "dense"), mlps(folders[2])
    assert all(torch.equal(back[name], given[name]) for name in given)
    moeforge.extract(stacked, tmp_path / "mean", average=True, verify=False)
    moeforge.extract(folder, tmp_path / "same", average=True, verify=False)
    assert all(
        torch.equal(t, mlps(tmp_path / "same")[n]) for n, t in mlps(tmp_path / "mean").items()
    )
    moeforge.experts(stacked, tmp_path / "fewer", drop=[1])
    moeforge.experts(folder, tmp_path / "plain", keep=[0, 2])
    made, plain = weights(tmp_path / "fewer"), weights(tmp_path / "plain")
    assert all(torch.equal(made[name], plain[name]) for name in plain)


def strangers(tmp_path, kind, **more):
    """A mixture that transformers has made, of four experts."""
    given = {**SHAPE, **ZOO[kind], "num_hidden_layers": 2, "mlp_only_layers": [], **more}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**given))
    randomize(model, 5)
    model.save_pretrained(tmp_path / kind)
    return tmp_path / kind, model


@pytest.mark.parametrize(
    ("kind", "more", "width"),
    [
        ("qwen3_moe", {"mlp_only_layers": [0], "decoder_sparse_step": 1}, WIDE),
        ("ernie4_5_moe", {"moe_layer_start_index": 1}, WIDE),
        ("granitemoeshared", {}, WIDE + 32),
    ],
)
def test_a_mixture_of_others_with_one_expert_left_is_the_dense_model(kind, more, width, tmp_path):
    """What `extract` promises; layers without experts are wider, some experts are shared."""
    folder, _ = strangers(tmp_path, kind, **more)
    moeforge.experts(folder, tmp_path / "one", keep=[2], top_k=1)
    moeforge.extract(folder, tmp_path / "dense", expert=2)
    alone = logits(load_output(tmp_path / "one"))
    assert (dense_logits(tmp_path / "dense") - alone).abs().max() <= 1e-4
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["intermediate_size"] == width


def test_shared_experts_become_part_of_the_mlp(tmp_path):
    """A factor on routed experts too."""
    more = {"routed_scaling_factor": 2.5, "norm_topk_prob": True, "partial_rotary_factor": 0.5}
    folder, model = strangers(tmp_path, "glm4_moe", first_k_dense_replace=1, **more)
    moeforge.extract(folder, tmp_path / "dense", expert=1)
    with torch.no_grad():  # a router that sends everything to one expert
        model.config.num_experts_per_tok = 1
        block = model.model.layers[1].mlp
        block.gate.top_k = block.top_k = 1
        block.gate.e_score_correction_bias.copy_(torch.tensor([0.0, 9.0, 0.0, 0.0]))
    assert (dense_logits(tmp_path / "dense") - logits(model)).abs().max() <= 1e-4
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert (config["model_type"], config["intermediate_size"]) == ("glm", 96)


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [
        ("qwen2_moe", {}, "weighed by a gate"),
        ("dbrx", {}, "norm_1.weight is not one everywhere"),
        ("glm4_moe", {"norm_topk_prob": False}, "do not add up to one"),
        ("cohere2_moe", {"num_shared_experts": 1}, "combines its shared experts by average"),
        ("gemma4_text", {"enable_moe_block": True, **GEMMA}, "two normalised branches"),
        ("olmoe", {}, "no mixture that can be taken apart"),
    ],
)  # fmt: skip
def test_what_makes_no_dense_model_is_refused_with_the_reason(kind, more, words, tmp_path):
    shape = {"layer_types": ["full_attention"] * 2} if kind == "gemma4_text" else {}
    if kind == "dbrx":
        more = {"n_layers": 2}
    folder, _ = strangers(tmp_path, kind, **shape, **more)
    with pytest.raises(PlanError, match=words):
        moeforge.extract(folder, tmp_path / "out", expert=0)
    assert not (tmp_path / "out").exists()


def test_kept_experts_keep_weights_and_rows_of_the_router(moe, tmp_path):
    folder, _ = moe
    moeforge.experts(folder, tmp_path / "out", keep=[2, 0], duplicate=[0], top_k=1)
    before, after = weights(folder), weights(tmp_path / "out")
    stem = "model.layers.1.block_sparse_moe."
    for new, old in enumerate([2, 0, 0]):
        for part in ("w1", "w2", "w3"):
            name = f"{stem}experts.{{}}.{part}.weight"
            assert torch.equal(after[name.format(new)], before[name.format(old)])
    rows = before[f"{stem}gate.weight"]
    assert torch.equal(after[f"{stem}gate.weight"], rows[[2, 0, 0]])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (3, 1)


def test_all_experts_in_another_order_are_the_same_mixture(moe, tmp_path):
    folder, _ = moe
    result = moeforge.experts(folder, tmp_path / "out", keep=[2, 0, 1])
    assert (logits(load_output(tmp_path / "out")) - logits(load_output(folder))).abs().max() < 1e-5
    assert result.plan.active_parameters < result.plan.parameters


@pytest.mark.parametrize(
    ("kind", "bias"),
    [
        ("dbrx", ""),
        ("ernie4_5_moe", "mlp.moe_statics.e_score_correction_bias"),
        ("granitemoe", ""),
        ("lfm2_moe", "feed_forward.expert_bias"),
    ],
)
def test_every_layout_is_regrouped(kind, bias, tmp_path):
    """In another order a mixture computes the same, stacked tensors and biases included."""
    more = {"n_layers": 2} if kind == "dbrx" else {}
    if kind == "lfm2_moe":
        more = {"layer_types": ["conv", "full_attention"]}
    if kind == "ernie4_5_moe":
        more = {"moe_layer_start_index": 1}
    folder, model = strangers(tmp_path, kind, **more)
    if bias:
        name, tensors = f"model.layers.1.{bias}", weights(folder)
        tensors[name] = torch.tensor([0.3, -0.2, 0.1, 0.5]).reshape(tensors[name].shape)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(folder)
    moeforge.experts(folder, tmp_path / "out", keep=[3, 1, 0, 2])
    assert (logits(load_output(tmp_path / "out")) - logits(model)).abs().max() < 1e-4


def test_each_layer_keeps_what_a_text_uses_most(moe, tmp_path):
    folder, _ = moe
    text = tmp_path / "text.txt"
    text.write_text("one text\n\nand another one\n")
    made = tmp_path / "out"
    arguments = ["experts", str(folder), "--keep-most", "2", "--text", str(text), "-o", str(made)]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    hold("experts", json.loads(done.stdout))
    report = json.loads(
        CliRunner().invoke(app, ["route", str(folder), "--prompts", str(text), "--json"]).stdout
    )
    kept = yaml.safe_load((made / "moeforge.yml").read_text())["regroup"]["keep"]
    for numbers, load in zip(kept, _loads(report), strict=True):
        assert {*numbers} == {*sorted(range(3), key=lambda n: -load[n])[:2]}
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    assert torch.equal(weights(made)[gate], weights(folder)[gate][kept[0]])


def _loads(report):
    return [layer["load"] for layer in report["layers"]]


def test_an_added_expert_is_met_by_routers_that_are_fitted_anew(moe, models, tmp_path):
    folder, _ = moe
    added = models("llama", seed=9, **TWO)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n\n".join(f"sentence number {n} is here" for n in range(6)))
    moeforge.experts(folder, tmp_path / "out", drop=[1], add=[added], refit=prompts)
    made, before, new = weights(tmp_path / "out"), weights(folder), weights(added)
    stem = "model.layers.0.block_sparse_moe."
    assert torch.equal(made[f"{stem}experts.1.w1.weight"], before[f"{stem}experts.2.w1.weight"])
    assert torch.equal(
        made[f"{stem}experts.2.w1.weight"], new["model.layers.0.mlp.gate_proj.weight"]
    )
    assert made[f"{stem}gate.weight"].shape[0] == 3
    assert not torch.equal(made[f"{stem}gate.weight"][0], before[f"{stem}gate.weight"][0])


def test_copies_without_noise_are_the_dense_model(models, tmp_path):
    folder = models("qwen3", seed=4, **VARIANTS["qwen3"])
    arguments = ["upcycle", str(folder), "--experts", "3", "-o", str(tmp_path / "plain"), "--json"]
    hold("upcycle", json.loads(CliRunner().invoke(app, arguments).stdout))
    assert (logits(load_output(tmp_path / "plain")) - dense_logits(folder)).abs().max() <= 1e-4


def test_noise_follows_from_the_seed_and_is_normal(models, tmp_path):
    folder = models("llama", seed=4, **TWO)
    for out, seed, threads in (("one", 7, 1), ("two", 7, 2), ("three", 8, 1)):
        settings = {"noise": 0.02, "seed": seed, "threads": threads, "verify": False}
        moeforge.upcycle(folder, tmp_path / out, experts=2, **settings)
    made, again, other = (weights(tmp_path / out) for out in ("one", "two", "three"))
    assert all(torch.equal(made[name], again[name]) for name in made)
    dense, stem = weights(folder), "model.layers.{}.block_sparse_moe.experts.{}.w1.weight"
    drawn = [
        made[stem.format(layer, expert)] - dense[f"model.layers.{layer}.mlp.gate_proj.weight"]
        for layer in (0, 1)
        for expert in (0, 1)
    ]
    noise = torch.stack(drawn).flatten(1).double()
    assert not torch.equal(made[stem.format(0, 0)], other[stem.format(0, 0)])
    assert (noise.mean(1).abs() < 0.02 * 5 / noise.shape[1] ** 0.5).all()
    assert ((noise.std(1) / 0.02 - 1).abs() < 0.05).all()
    assert abs((noise.abs() < 0.02).double().mean() - 0.6827) < 0.02
    assert (torch.corrcoef(noise) - torch.eye(4)).abs().max() < 0.06, "each copy has its own"
    names = ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight")
    assert all(torch.equal(made[name], dense[name]) for name in names)


def test_noise_follows_from_the_number_of_the_element():
    """However a tensor is sliced, as workers do; and no stretch of it has the noise of another."""
    whole = torch.zeros(4000)
    noise.add(whole, 1.0, 5, 0)
    parts = [torch.zeros(length) for length in (1, 1501, 2498)]
    for start, part in zip((0, 1, 1502), parts, strict=True):
        noise.add(part, 1.0, 5, start)
    assert torch.equal(torch.cat(parts), whole)
    assert len(whole.unique()) > 3990


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["extract", "MOE"], "Say which: --expert N, or --average"),
        (["extract", "MOE", "--expert", "3"], "Valid: 0 to 2"),
        (
            ["extract", "MOE", "--expert", "0", "--as", "qwen2"],
            "makes no qwen2 model Take llama or mistral",
        ),
        (["experts", "MOE"], "nothing about the experts"),
        (["experts", "DENSE", "--drop", "0"], "`moeforge upcycle` makes one of a dense model"),
        (["extract", "DENSE", "--expert", "0"], "`moeforge upcycle` makes one of a dense model"),
        (["experts", "MOE", "--keep", "0"], "lower experts_per_token to 1"),
        (["experts", "MOE", "--drop", "0,1,2"], "no expert is left"),
        (["experts", "MOE", "--drop", "4"], "there is no expert 4"),
        (["experts", "MOE", "--keep", "0", "--drop", "1"], "said twice"),
        (["experts", "MOE", "--add", "MOE"], "Give --refit FILE"),
        (["experts", "MOE", "--keep-most", "2"], "--text FILE"),
        (["upcycle", "MOE", "--gate", "fitted"], "needs prompts"),
    ],
)
def test_mistakes_are_said_before_anything_is_written(arguments, words, moe, tmp_path):
    named = {"MOE": str(moe[0]), "DENSE": str(moe[1][0])}
    given = [named.get(word, word) for word in arguments]
    done = CliRunner().invoke(app, [*given, "-o", str(tmp_path / "out")])
    assert done.exit_code == 4
    assert words in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"extract": {"model": "a", "expert": -1}}, "from 0"),
        ({"extract": {"model": "a", "expert": "mean"}}, "average"),
        ({"regroup": {"model": "a", "keep": []}}, "a list of experts"),
        ({"regroup": {"model": "a", "keep": [[0, 1], [0]]}}, "differ in length"),
    ],
)
def test_recipes_of_surgery_are_strict(recipe, words):
    with pytest.raises(RecipeError, match=words):
        moeforge.plan(recipe)


def test_an_incomplete_mixture_is_refused(moe, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    tensors = weights(moe[0])
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((moe[0] / "config.json").read_text())
    with pytest.raises(MoeforgeError, match=r"lacks model.layers.1.block_sparse_moe.experts.2.w3"):
        moeforge.extract(folder, tmp_path / "out", expert=0)
    edit_config(folder, num_local_experts="some")
    with pytest.raises(MoeforgeError, match="transformers does not read its config"):
        moeforge.extract(folder, tmp_path / "out", expert=0)


def test_an_expert_may_stand_where_a_model_stands(moe, tmp_path):
    folder, folders = moe
    expert = {"extract": {"model": str(folder), "expert": 1}}
    recipe = {"merge_method": "linear", "models": [
        {"model": expert, "parameters": {"weight": 1}},
        {"model": str(folders[2]), "parameters": {"weight": 3}},
    ]}  # fmt: skip
    moeforge.build(recipe, tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    mean = (weights(folders[1])[name] + 3 * weights(folders[2])[name]) / 4
    assert (weights(tmp_path / "out")[name] - mean).abs().max() < 1e-6
    again = moeforge.rebuild(tmp_path / "out" / "moeforge.lock.json", tmp_path / "again")
    assert again is not None
    assert torch.equal(weights(tmp_path / "again")[name], weights(tmp_path / "out")[name])

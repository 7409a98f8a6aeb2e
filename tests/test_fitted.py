"""Builds with fitted gates: the inputs of the mixture itself, labels by loss, load, same bits."""

import itertools
import json
import multiprocessing

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import in_a_child
from transformers import AutoModelForCausalLM, AutoTokenizer
from zoo import ZOO

import moeforge
from moeforge import gates, mixing, workers
from moeforge.errors import show_path
from moeforge.fit_tables import fits_json, fits_table
from moeforge.forward import losses
from moeforge.gates import fitted
from moeforge.planners import Planner
from moeforge.proof.heldout import load_output
from moeforge.recipe import Reference
from moeforge.routing import recording, routers
from moeforge.sources import open_source
from moeforge.weights import Weights

TEXTS = [
    [
        "def f(x):\n    return x + 1",
        "import os, sys",
        "class A(B): pass",
        "for i in range(9): x += i",
    ],
    ["Der schnelle braune Fuchs.", "Guten Morgen, wie geht es?", "Das ist ein Haus.", "Ja, nein."],
    ["le chat noir dort ici", "bonjour le monde", "il fait beau temps", "une maison rouge"],
]


def recipe(base, experts, parameters=None, texts=TEXTS, **more):
    entries = [
        {"source_model": str(folder), "positive_prompts": list(prompts)}
        for folder, prompts in zip(experts, texts, strict=False)
    ]
    return {
        "base_model": base if isinstance(base, dict) else str(base),
        "experts": entries,
        "gate_parameters": parameters or {},
        **more,
    }


def averaged(folders):
    inputs = [{"model": str(folder), "parameters": {"weight": 1}} for folder in folders]
    return {"merge_method": "linear", "models": inputs}


# --- whole builds --------------------------------------------------------------------------------


def met_by_routers(folder, ids):
    """What the routers of a built mixture get, from hooks on transformers' model."""
    model = load_output(folder, code=(folder / "modeling_moeforge.py").exists())
    seen = {router.layer: [] for router in routers(model)}
    for router in routers(model):

        def look(module, args, layer=router.layer):
            seen[layer].append(args[0].reshape(-1, args[0].shape[-1])[-len(ids) :])

        router.owner.register_forward_pre_hook(look)
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=False)
    return {layer: found[0] for layer, found in seen.items()}


HOMES = {
    "llama": {},
    "llama, sigmoid": {"architecture": "glm4_moe"},
    "llama, remote": {"architecture": "remote"},
    "llama, all experts": {"experts_per_token": 3},
    "llama, some layers": {"architecture": "qwen2_moe", "layers": [1, 2]},
    "granite": {},
    "lfm2": {},
    "olmo2": {},
    "bloom": {},
    "opt": {},
    "gemma4_text": {},
    "ernie4_5": {},
    "cohere2": {},
}


@pytest.mark.parametrize("case", HOMES)
def test_on_policy_inputs_are_those_of_the_built_mixture(case, models, tmp_path, monkeypatch):
    kind, asked = case.split(",")[0], []
    build = fitted.build

    def looked(data):
        grow = data.grow

        def told(fit):
            def kept(seen):
                asked.append([inputs.mlp_TH for inputs in seen])
                return fit(seen)

            grow(kept)

        object.__setattr__(data, "grow", told)
        return build(data)

    monkeypatch.setattr(gates, "load", lambda mode: gates.Gate(mode, looked, needs_prompts=True))
    folders = [models(kind, seed=seed, **ZOO[kind]) for seed in (1, 2, 3)]
    wanted = recipe(folders[0], folders, {"on_policy": True}, **HOMES[case])
    wanted["experts"][1]["residual_scale"] = 0.7
    balance = {"on_policy": True, "balance": 1} if "sigmoid" in case else {"on_policy": True}
    wanted["gate_parameters"] = balance
    moeforge.build(wanted, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    texts = list(itertools.chain(*TEXTS))
    for number in (0, 6):
        ids = tokenizer(texts[number])["input_ids"]
        met = met_by_routers(tmp_path / "out", ids)
        for expected, seen in zip(met.values(), asked, strict=True):
            assert (seen[number] - expected).abs().max() < 1e-4 * max(1, expected.abs().max())
            assert expected.std() > 0.01


def built_as_fitted(wanted, out, monkeypatch):
    """Build; what the fit took for the output of each layer is what the built model computes."""
    seen = []
    run = mixing.Mixing.run

    def kept(self, layer, gate, x):
        seen.append((x, run(self, layer, gate, x)))
        return seen[-1][1]

    monkeypatch.setattr(mixing.Mixing, "run", kept)
    moeforge.build(wanted, out)
    model = load_output(out)
    with torch.no_grad():
        for layer, (x, expected) in enumerate(seen):
            made = model.model.layers[layer].mlp(x[None])
            made = made[0] if isinstance(made, tuple) else made
            assert (made.reshape(x.shape) - expected).abs().max() < 1e-4 * expected.abs().max()
    return model


def test_shared_experts_are_part_of_what_is_met(models, tmp_path, monkeypatch):
    folders = [models("qwen2", seed=seed, **ZOO["qwen2"]) for seed in (1, 2, 3)]
    wanted = recipe(folders[0], folders[:2], {"on_policy": True}, architecture="qwen2_moe")
    shared = {"source_model": str(folders[2]), "positive_prompts": TEXTS[2]}
    wanted["shared_experts"] = [shared]
    model = built_as_fitted(wanted, tmp_path / "out", monkeypatch)
    weights = [model.model.layers[n].mlp.shared_expert_gate.weight for n in range(4)]
    assert all(bool(weight.any()) for weight in weights)


def gates_of(folder):
    tensors = load_file(folder / "model.safetensors")
    return [tensors[name] for name in sorted(tensors) if ".gate." in name]


def built_by_each_number_of_threads(*given):
    """In a process each, forked before any thread has multiplied: imports are what takes long."""
    for number in (1, 2, 5):
        child = multiprocessing.get_context("fork").Process(
            target=built_by_threads, args=(number, *given)
        )
        child.start()
        child.join()
        assert child.exitcode == 0, number


def built_by_threads(number, recipes, folder):
    workers.SMALL = 0
    torch.set_num_threads(number)
    for method, wanted in recipes.items():
        moeforge.build(wanted, folder / f"{method}-{number}", threads=1, verify=False)
    assert torch.get_num_threads() == number
    assert workers.multiplied is (number > 1)


def test_any_number_of_threads_gives_the_same_bits(llamas, tmp_path):
    recipes = {
        method: recipe(
            llamas[0],
            llamas,
            {"method": method, "on_policy": True, "balance": 0.5},
            dtype="float32",
        )
        for method in ("ridge", "logistic")
    }
    in_a_child(built_by_each_number_of_threads, recipes, tmp_path)
    for method in recipes:
        first, *others = (gates_of(tmp_path / f"{method}-{number}") for number in (1, 2, 5))
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_order_of_experts_prompts_does_not_matter(llamas, tmp_path):
    """Prompts in the recipe or in a file, and experts in another order: the same rows."""
    (tmp_path / "one.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS[1]))
    first = recipe(llamas[0], llamas, dtype="float32")
    second = recipe(llamas[0], llamas, dtype="float32")
    del second["experts"][1]["positive_prompts"]
    second["experts"][1]["prompts_file"] = str(tmp_path / "one.jsonl")
    third = {**first, "experts": first["experts"][::-1]}
    for name, wanted in (("first", first), ("second", second), ("third", third)):
        moeforge.build(wanted, tmp_path / name)
    one, two, three = (gates_of(tmp_path / name) for name in ("first", "second", "third"))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(
        (a - b.flip(0)).abs().max() < 1e-5 * a.abs().max() for a, b in zip(one, three, strict=True)
    )


def test_a_base_that_is_a_recipe_is_fitted_on_policy(llamas, tmp_path):
    base = averaged(llamas)
    made = {}
    for name, given in (
        ("default", {}),
        ("on", {"on_policy": True}),
        ("off", {"on_policy": False}),
    ):
        moeforge.build(recipe(base, llamas, given, dtype="float32"), tmp_path / name)
        made[name] = gates_of(tmp_path / name)
    assert all(torch.equal(a, b) for a, b in zip(made["default"], made["on"], strict=True))
    assert torch.equal(made["off"][0], made["on"][0]), "the first layer sees the same"
    assert not torch.equal(made["off"][-1], made["on"][-1])


def counted_load(folder, tokenizer, per_token=2):
    """Loads of the built mixture by layer, expert prompts weighing alike, from its own routers."""
    model = load_output(folder)
    found = routers(model)
    total = {router.layer: torch.zeros(3) for router in found}
    for texts in TEXTS:
        prompts = [tokenizer(text)["input_ids"] for text in texts]
        weight = 1 / sum(len(ids) - 1 for ids in prompts)
        for ids in prompts:
            with recording(found) as seen, torch.no_grad():
                model(input_ids=torch.tensor([ids]), use_cache=False)
            for router in found:
                kept = router.shares(seen[router.layer][0][1:]) > 0
                total[router.layer] += weight * kept.sum(0)
    return [row / row.sum() for row in total.values()]


@pytest.mark.parametrize("home", ["mixtral", "glm4_moe"])
def test_balance_is_what_the_built_mixture_does(home, llamas, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(llamas[0])
    target = (0.5, 0.3, 0.2)
    for name, asked in (("none", 0), ("full", target), ("half", 0.5)):
        given = {"on_policy": True, "balance": asked, "regularization": 0.1}
        wanted = recipe(llamas[0], llamas, given, architecture=home, dtype="float32")
        result = moeforge.build(wanted, tmp_path / name)
        counted = counted_load(tmp_path / name, tokenizer)
        assert len(result.fits) == 4
        for row, fit in zip(counted, result.fits, strict=True):
            assert row.tolist() == pytest.approx(fit.load, abs=0.01)
            if name == "none":
                assert fit.load == fit.fitted_load
            if name == "full":
                assert row.tolist() == pytest.approx(target, abs=0.02)
        shown = fits_json(result.fits, result.plan.experts)
        assert json.loads(json.dumps(shown)) == shown
        assert [list(row["load"].values()) for row in shown] == [list(f.load) for f in result.fits]
        assert fits_table(result.fits, result.plan.experts).row_count == 4
    names = [n for n in load_file(tmp_path / "full" / "model.safetensors") if "bias" in n]
    biases_on_disk = load_file(tmp_path / "full" / "model.safetensors")
    assert bool(names) is (home == "glm4_moe")
    assert all(bool(biases_on_disk[name].any()) for name in names)


def test_losses_are_those_of_transformers(models):
    for kind in ("llama", "gpt2", "cohere2", "lfm2"):
        folder = models(kind, seed=3, with_tokenizer=False, **ZOO[kind])
        planner = Planner(lambda reference: open_source(reference.model))
        weights = Weights(planner.model(Reference(model=str(folder)), ()))
        config = json.loads((folder / "config.json").read_text())
        prompts = [list(range(3, 30)), [7, 9, 200, 11, 250], [5]]
        made = losses(config, prompts, weights.read, weights.rows, "cpu", workers.alone)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        for ids, found in zip(prompts[:2], made, strict=False):
            batch = torch.tensor([ids])
            with torch.no_grad():
                expected = model(input_ids=batch, labels=batch, use_cache=False).loss
            assert found == pytest.approx(float(expected), abs=1e-4)
        assert made[2] == 0


def test_labels_by_loss_need_no_owners(models, tmp_path):
    # Experts that differ in what their head likes: each predicts one of two bytes best.
    base = models("llama", seed=1, tie_word_embeddings=False)
    experts = []
    for letter in "ab":
        folder = models.copy(base, f"likes-{letter}")
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = 0.01 * tensors["lm_head.weight"]
        tokenizer = AutoTokenizer.from_pretrained(base)
        number = tokenizer(letter)["input_ids"][1]
        tensors["model.norm.weight"] = torch.ones(64)
        for layer in range(4):
            tensors[f"model.layers.{layer}.mlp.down_proj.weight"] *= 0
            tensors[f"model.layers.{layer}.self_attn.o_proj.weight"] *= 0
        tensors["lm_head.weight"][number] = tensors["model.embed_tokens.weight"][number]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        experts.append(folder)
    texts = ["a" * n for n in range(8, 16)] + ["b" * n for n in range(8, 16)]
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    given = {"labels": "loss", "data": str(path)}
    wanted = recipe(base, experts, given, texts=[[], []], experts_per_token=1, dtype="float32")
    moeforge.build(wanted, tmp_path / "out")
    model = load_output(tmp_path / "out")
    found = routers(model)
    for expert, letter in enumerate("ab"):
        ids = tokenizer(letter * 12)["input_ids"]
        with recording(found) as seen, torch.no_grad():
            model(input_ids=torch.tensor([ids]), use_cache=False)
        for router in found:
            assert bool((seen[router.layer][0][4:].argmax(-1) == expert).all())
    wanted["experts"][0]["positive_prompts"] = ["bbbb", "bbbbbbbb", "bbbbbb"]
    moeforge.build(wanted, tmp_path / "both")
    assert not torch.equal(gates_of(tmp_path / "both")[0], gates_of(tmp_path / "out")[0])


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "path", "said"),
    [
        (
            {"gate_mode": "hidden", "gate_parameters": {"method": "ridge"}},
            "",
            "hidden has no param",
        ),
        ({"gate_parameters": {"methd": "ridge"}}, ".methd", 'did you mean "method"'),
        ({"gate_parameters": {"method": "lasso"}}, ".method", 'unknown method "lasso"'),
        ({"gate_parameters": {"regularization": 0}}, ".regularization", "greater than 0"),
        ({"gate_parameters": {"labels": "loss"}}, "", "needs data"),
        ({"gate_parameters": {"data": "x.txt"}}, "", "labels: loss"),
        ({"gate_parameters": {"balance": 1.5}}, ".balance", "from 0 to 1"),
        ({"gate_parameters": {"balance": True}}, ".balance", "from 0 to 1"),
        ({"gate_parameters": {"balance": [1, 0, 1]}}, ".balance", "above 0"),
        ({"gate_parameters": {"balance": [1, 1]}}, "", "2 shares, the mixture 3"),
        ({"gate_parameters": {"balance": [8, 1, 1]}}, "", "at most 50%"),
        ({"gate_parameters": {"labels": "loss", "data": "no.txt"}}, ".data", "No such file"),
    ],
)
def test_what_cannot_be_is_said(changes, path, said, llamas):
    report = moeforge.check({**recipe(llamas[0], llamas), **changes})
    found = {show_path(f.path): f.what for f in report.errors}
    assert f"$.gate_parameters{path}" in found, found
    assert said in found[f"$.gate_parameters{path}"]


def test_labels_by_loss_want_whole_models(llamas, tmp_path):
    (tmp_path / "all.txt").write_text("one\n\ntwo\n")
    wanted = recipe(llamas[0], llamas, {"labels": "loss", "data": str(tmp_path / "all.txt")})
    parts = [
        {"model": str(llamas[1]), "layer_range": [0, 2]},
        {"model": str(llamas[2]), "layer_range": [2, 4]},
    ]
    wanted["experts"][1]["source_model"] = parts
    report = moeforge.check(wanted)
    assert [show_path(f.path) for f in report.errors] == ["$.experts[1].source_model"]
    assert "made of ranges" in report.errors[0].what


def test_ranges_of_models_are_run_as_they_are_built(llamas, tmp_path, monkeypatch):
    wanted = recipe(llamas[0], llamas, {"on_policy": True}, dtype="float32")
    wanted["experts"][1]["source_model"] = [
        {"model": str(llamas[1]), "layer_range": [0, 2]},
        {"model": str(llamas[2]), "layer_range": [2, 4]},
    ]
    built_as_fitted(wanted, tmp_path / "out", monkeypatch)

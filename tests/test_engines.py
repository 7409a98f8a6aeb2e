"""What moeforge builds, read by other engines: equal logits, or `check --target` says why not.

Each engine is another interpreter, named by an environment variable (docs/engines.md makes them):
MOEFORGE_TRANSFORMERS4, MOEFORGE_MLX, MOEFORGE_LLAMACPP, MOEFORGE_VLLM. Without any of them there
is nothing to test here.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import moeforge
from moeforge import families, targets

READERS = Path(__file__).parent / "readers"
VARIABLES = {
    "transformers4": "MOEFORGE_TRANSFORMERS4",
    "mlx": "MOEFORGE_MLX",
    "llama.cpp": "MOEFORGE_LLAMACPP",
    "vllm": "MOEFORGE_VLLM",
}
INTERPRETERS = {e: os.environ[v] for e, v in VARIABLES.items() if v in os.environ}
if not INTERPRETERS:
    variables = ", ".join(VARIABLES.values())
    pytest.skip(f"no other engine is named by {variables}", allow_module_level=True)

SIZES = {"hidden_size": 128, "intermediate_size": 192}
"""Heads of 32: vLLM's attention on CPUs has no smaller ones."""


def scaled(rope_type, **rest):
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 5e5, **rest}}


LLAMA3 = scaled(
    "llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = scaled("yarn", factor=4.0, original_max_position_embeddings=16)
LINEAR = scaled("linear", factor=4.0)
PLAIN = scaled("default")
TIED = {"tie_word_embeddings": True}
WINDOW = {"sliding_window": 8}
SLIDING = {"use_sliding_window": True, "max_window_layers": 2, **WINDOW}
MULTIPLIERS = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}

MIXTURES = {
    "llama": ("mixtral", "llama", PLAIN),
    "llama-tied": ("mixtral", "llama", TIED),
    "llama-head-dim": ("mixtral", "llama", {"head_dim": 64}),
    "llama-linear": ("mixtral", "llama", LINEAR),
    "llama-llama3": ("mixtral", "llama", LLAMA3),
    "llama-yarn": ("mixtral", "llama", YARN),
    "llama-biases": ("granitemoe", "llama", {"attention_bias": True, **PLAIN}),
    "mistral-window": ("mixtral", "mistral", {**WINDOW, **PLAIN}),
    "mistral": ("mixtral", "mistral", {"sliding_window": None, **PLAIN}),
    "qwen2": ("qwen2_moe", "qwen2", PLAIN),
    "qwen2-tied": ("qwen2_moe", "qwen2", TIED),
    "qwen2-sliding": ("qwen2_moe", "qwen2", SLIDING),
    "qwen2-granite": ("granitemoe", "qwen2", PLAIN),
    "qwen3": ("qwen3_moe", "qwen3", {"head_dim": 32, **PLAIN}),
    "qwen3-tied": ("qwen3_moe", "qwen3", {"head_dim": 32, **TIED}),
    "qwen3-biases": ("qwen3_moe", "qwen3", {"head_dim": 64, "attention_bias": True}),
    "qwen3-yarn": ("qwen3_moe", "qwen3", {"head_dim": 32, **YARN}),
    "granite": ("granitemoe", "granite", {**MULTIPLIERS, **PLAIN}),
    "granite-biases": ("granitemoe", "granite", {**MULTIPLIERS, "attention_bias": True}),
    "granite-tied": ("granitemoe", "granite", {**MULTIPLIERS, **TIED}),
}
"""Architecture, dense type and what is special about it, by name."""

OTHERS = ("stack", "stack-tied", "linear", "linear-qwen3")
CASES = (*MIXTURES, *OTHERS)


def recipe_of(case, models):
    """Return a recipe and the dense model it must equal; None where that is its own output."""
    if case in MIXTURES:
        home, kind, special = MIXTURES[case]
        dense = str(models(kind, seed=3, **{**SIZES, **special}))
        experts = [{"source_model": dense}] * 4
        recipe = {"base_model": dense, "experts": experts, "gate_mode": "random"}
        return {**recipe, "architecture": home}, dense
    special = {"stack": YARN, "stack-tied": TIED, "linear": LLAMA3, "linear-qwen3": PLAIN}[case]
    kind = "qwen3" if case == "linear-qwen3" else "llama"
    a, b = (str(models(kind, seed=seed, **{**SIZES, **special})) for seed in (1, 2))
    if case.startswith("stack"):
        slices = [{"sources": [{"model": a, "layer_range": [0, 3]}]}]
        slices += [{"sources": [{"model": b, "layer_range": [1, 4]}]}]
        return {"merge_method": "passthrough", "slices": slices}, None
    merged = [{"model": a, "parameters": {"weight": 0.3}}]
    merged += [{"model": b, "parameters": {"weight": 0.7}}]
    return {"merge_method": "linear", "models": merged, "dtype": "float32"}, None


def logits(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(input_ids=torch.from_numpy(ids), use_cache=False).logits.numpy()


def old_class(path):
    """Write the tokenizer's class as transformers 4 knows it; nobody reads tokens here."""
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "tokenizer_class": "PreTrainedTokenizerFast"}))


@pytest.fixture(scope="module")
def built(models, tmp_path_factory):
    """A maker of outputs: `built(case)` -> folder, ids, logits here, and the recipe."""
    root, made = tmp_path_factory.mktemp("engines"), {}
    ids = np.random.default_rng(0).integers(0, 256, (2, 40))

    def build(case):
        if case not in made:
            recipe, dense = recipe_of(case, models)
            moeforge.build(recipe, root / case)
            old_class(root / case / "tokenizer_config.json")
            np.save(root / "ids.npy", ids)
            made[case] = root / case, logits(dense or root / case, ids), recipe
        return made[case]

    return build


@pytest.fixture(scope="module", params=INTERPRETERS)
def reader(request):
    """An engine at work: `reader(folder, ids)` -> logits, or the engine's error as a text."""
    script = READERS / f"read_{request.param.replace('.', '')}.py"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    process = subprocess.Popen(
        [INTERPRETERS[request.param], script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )

    def read(folder):
        job = {"folder": str(folder), "ids": str(folder.parent / "ids.npy")}
        job["out"] = str(folder.parent / f"{folder.name}.npy")
        print(json.dumps(job), file=process.stdin, flush=True)
        answer = json.loads(process.stdout.readline())
        return answer.get("error") or np.load(job["out"])

    yield request.param, read
    process.kill()
    process.wait()


@pytest.mark.parametrize("case", CASES)
def test_an_engine_reads_the_same_model_or_check_says_why_not(case, reader, built):
    engine, read = reader
    folder, expected, recipe = built(case)
    found = read(folder)
    errors, notes = targets.report(moeforge.plan(recipe), engine)
    told = [*errors, *(note for note in notes if note.warning)]
    agrees = not isinstance(found, str) and np.abs(found - expected).max() < 1e-4
    worst = (
        found if isinstance(found, str) else f"max |Δlogit| {np.abs(found - expected).max():.2g}"
    )
    print(f"{engine} {case}: {worst}; {[finding.what for finding in told]}")
    assert agrees is not bool(told), f"{worst}; check --target {engine} says {told}"


def test_the_comparison_means_something(built):
    for case in MIXTURES:
        assert families.load(MIXTURES[case][0]).architecture in str(
            json.loads((built(case)[0] / "config.json").read_text())["architectures"]
        )
        assert built(case)[1].std() > 0.1

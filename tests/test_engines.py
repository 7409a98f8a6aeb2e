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
from zoo import ENDS, ZOO

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
FACTORS = {
    "short_factor": [1 + i / 16 for i in range(16)],
    "long_factor": [2.0 + i for i in range(16)],
}
LONG = {"original_max_position_embeddings": 32, **scaled("longrope", **FACTORS)}
QUERIES = scaled(
    "yarn",
    factor=4.0,
    original_max_position_embeddings=64,
    mscale=1.0,
    mscale_all_dim=1.0,
    llama_4_scaling_beta=0.1,
)
MSCALE = {"original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.7}
SOME = {key: factors[:12] for key, factors in FACTORS.items()}
PARTIAL_LONG = {
    "original_max_position_embeddings": 32,
    **scaled("longrope", partial_rotary_factor=0.75, **SOME),
}
PARTIAL = scaled("default", partial_rotary_factor=0.75)
WINDOW = {"sliding_window": 8}
SLIDING = {"use_sliding_window": True, "max_window_layers": 2, **WINDOW}
FULL = {"use_sliding_window": False}
ATTENTION = {
    "layer_types": ["attention"] * 4,
    "position_embedding_type": "rope",
    "mamba_d_head": 64,
}
WIDE_MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64}
"""Of DeepSeek's own size: vLLM knows no other."""
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
    "llama-qwen2": ("qwen2_moe", "llama", PLAIN),
    "llama-glm": ("glm4_moe", "llama", PLAIN),
    "mistral-window": ("mixtral", "mistral", {**WINDOW, **PLAIN}),
    "mistral": ("mixtral", "mistral", {"sliding_window": None, **PLAIN}),
    "phi3": ("mixtral", "phi3", PLAIN),
    "phi3-longrope": ("mixtral", "phi3", LONG),
    "phi3-partial": ("glm4_moe", "phi3", PARTIAL),
    "helium": ("mixtral", "helium", PLAIN),
    "ministral3": ("mixtral", "ministral3", QUERIES),
    "ernie": ("ernie4_5_moe", "ernie4_5", PLAIN),
    "ernie-mixtral": ("mixtral", "ernie4_5", PLAIN),
    "arcee": ("mixtral", "arcee", PLAIN),
    "gemma": ("mixtral", "gemma", PLAIN),
    "gemma-granite": ("granitemoe", "gemma", PLAIN),
    "qwen2": ("qwen2_moe", "qwen2", {**FULL, **PLAIN}),
    "qwen2-all": ("qwen2_moe", "qwen2", {**FULL, **PLAIN}),
    "qwen2-shared": ("qwen2_moe", "qwen2", {**FULL, **PLAIN}),
    "qwen2-tied": ("qwen2_moe", "qwen2", {**FULL, **TIED}),
    "qwen2-sliding": ("qwen2_moe", "qwen2", SLIDING),
    "qwen2-granite": ("granitemoe", "qwen2", {**FULL, **PLAIN}),
    "qwen2-glm": ("glm4_moe", "qwen2", {**FULL, **PLAIN}),
    "ministral": ("qwen2_moe", "ministral", {**PLAIN, "layer_types": ENDS}),
    "qwen3": ("qwen3_moe", "qwen3", {**FULL, **PLAIN}),
    "qwen3-tied": ("qwen3_moe", "qwen3", {**FULL, **TIED}),
    "qwen3-biases": ("qwen3_moe", "qwen3", {**FULL, "head_dim": 64, "attention_bias": True}),
    "qwen3-yarn": ("qwen3_moe", "qwen3", {**FULL, **YARN}),
    "qwen3-dots": ("dots1", "qwen3", {**SLIDING, **PLAIN}),
    "qwen3-mellum": ("mellum", "qwen3", {**SLIDING, **PLAIN}),
    "qwen3.5": ("qwen3_5_moe_text", "qwen3_5_text", {}),
    "granite": ("granitemoe", "granite", {**MULTIPLIERS, **PLAIN}),
    "granite-biases": ("granitemoe", "granite", {**MULTIPLIERS, "attention_bias": True}),
    "granite-tied": ("granitemoe", "granite", {**MULTIPLIERS, **TIED}),
    "granite-shared": ("granitemoeshared", "granite", {**MULTIPLIERS, **PLAIN}),
    "granite-mixtral": ("mixtral", "granite", {**MULTIPLIERS, **PLAIN}),
    "granite-attention": ("granitemoehybrid", "granitemoehybrid", {**ATTENTION, **MULTIPLIERS}),
    "granite-mamba": ("granitemoehybrid", "granitemoehybrid", {**MULTIPLIERS, "mamba_d_head": 64}),
    "granite-swa": ("granitemoe_swa", "granite_swa", MULTIPLIERS),
    "smollm3": ("granitemoe_swa", "smollm3", {}),
    "seed": ("granitemoe", "seed_oss", {}),
    "hyperclovax": ("granitemoe", "hyperclovax", {"use_post_norm": False, **MULTIPLIERS}),
    "glm": ("glm4_moe", "glm", {}),
    "glm-shared": ("glm4_moe", "glm", {}),
    "youtu-shared": ("deepseek_v3", "youtu", WIDE_MLA),
    "dots-shared": ("dots1", "qwen3", {**SLIDING, **PLAIN, "num_key_value_heads": 4}),
    "hunyuan-shared": ("hunyuan_v1_moe", "hunyuan_v1_dense", PLAIN),
    "granite-half": ("granitemoeshared", "granite", {**MULTIPLIERS, **PLAIN}),
    "dots": ("dots1", "qwen3", {**FULL, **PLAIN, "num_key_value_heads": 4}),
    "youtu-untied": ("deepseek_v3", "youtu", {"tie_word_embeddings": False}),
    "youtu": ("deepseek_v3", "youtu", {}),
    "minicpm3": ("deepseek_v3", "minicpm3", {}),
    "hunyuan": ("hunyuan_v1_moe", "hunyuan_v1_dense", PLAIN),
    "olmo": ("dbrx", "olmo", PLAIN),
    "olmo2": ("flex_olmo", "olmo2", PLAIN),
    "granite-yarn": ("granitemoe", "granite", {**MULTIPLIERS, **YARN}),
    "phi4-mini": ("glm4_moe", "phi3", PARTIAL_LONG),
    "youtu-yarn": ("deepseek_v3", "youtu", scaled("yarn", factor=4.0, **MSCALE)),
    "olmo-linear": ("dbrx", "olmo", LINEAR),
    "olmo2-linear": ("flex_olmo", "olmo2", LINEAR),
    "cohere-linear": ("cohere2_moe", "cohere", {"logit_scale": 0.5, **LINEAR}),
    "qwen3-some": ("qwen3_moe", "qwen3", {**FULL, **PLAIN}),
    "glm-some": ("glm4_moe", "glm", {}),
    "ernie-some": ("ernie4_5_moe", "ernie4_5", PLAIN),
    "cohere": ("cohere2_moe", "cohere", {"logit_scale": 0.5, **PLAIN}),
    "cohere2": ("cohere2_moe", "cohere2", {"logit_scale": 0.5, **PLAIN}),
    "lfm2": ("lfm2_moe", "lfm2", {}),
    "gemma4": ("gemma4_text", "gemma4_text", {"global_head_dim": 32}),
    "gemma2": ("remote", "gemma2", PLAIN),
    "gpt2": ("remote", "gpt2", {}),
}
"""Architecture, dense type and what is special about it, by name."""

SHARED = {"qwen2-shared", "glm-shared", "youtu-shared", "dots-shared", "hunyuan-shared"}
SHARED |= {"granite-half", "dots", "youtu-untied", "youtu-yarn", "phi4-mini", "glm-some"}
"""Half of the MLP is a shared expert there, and half of it in each of the others."""

LAYERS = {
    "qwen3-some": {"every": 2},
    "glm-some": {"skip_first": 1},
    "ernie-some": {"skip_first": 1},
}
"""Which layers have experts, if not all."""

OTHERS = ("stack", "stack-tied", "linear", "linear-qwen3")
CASES = (*MIXTURES, *OTHERS)


def sizes(kind, special):
    heads = {"head_dim": 32} if "head_dim" in ZOO.get(kind, {}) else {}
    return {**ZOO.get(kind, {}), **SIZES, **heads, **special}


def recipe_of(case, models):
    """Return a recipe and the dense model it must equal; None where that is its own output."""
    if case in MIXTURES:
        home, kind, special = MIXTURES[case]
        dense = str(models(kind, seed=3, **sizes(kind, special)))
        expert = {"source_model": dense, "residual_scale": 0.5 if case in SHARED else 1.0}
        recipe = {"base_model": dense, "experts": [expert] * 4, "gate_mode": "uniform_random"}
        recipe["experts_per_token"] = 4 if case == "qwen2-all" else 2
        recipe["shared_experts"] = [expert] if case in SHARED else []
        recipe["layers"] = LAYERS.get(case, "all")
        return {**recipe, "architecture": home}, dense
    special = {
        "stack": YARN,
        "stack-tied": TIED,
        "linear": LLAMA3,
        "linear-qwen3": {**FULL, **PLAIN},
    }[case]
    kind = "qwen3" if case == "linear-qwen3" else "llama"
    a, b = (str(models(kind, seed=seed, **sizes(kind, special))) for seed in (1, 2))
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


class Reader:
    """An engine at work in its own interpreter; one that crashed is started again."""

    def __init__(self, engine):
        self.engine, self.process = engine, None

    def start(self):
        script = READERS / f"read_{self.engine.replace('.', '')}.py"
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [INTERPRETERS[self.engine], script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __call__(self, folder):
        """Return the engine's logits of a folder, or its error as a text."""
        if self.process is None or self.process.poll() is not None:
            self.start()
        out = folder.parent / f"{folder.name}.npy"
        job = {"folder": str(folder), "ids": str(folder.parent / "ids.npy"), "out": str(out)}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            return f"the engine ended with exit code {self.process.wait()}"
        return json.loads(answer).get("error") or np.load(out)

    def stop(self):
        if self.process:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module", params=INTERPRETERS)
def reader(request):
    reader = Reader(request.param)
    yield reader
    reader.stop()


@pytest.mark.parametrize("case", CASES)
def test_an_engine_reads_the_same_model_or_check_says_why_not(case, reader, built):
    engine = reader.engine
    folder, expected, recipe = built(case)
    found = reader(folder)
    errors, notes = targets.report(moeforge.plan(recipe), engine)
    told = [*errors, *(note for note in notes if note.warning)]
    agrees = not isinstance(found, str) and np.abs(found - expected).max() < 1e-4
    worst = (
        found if isinstance(found, str) else f"max |Δlogit| {np.abs(found - expected).max():.2g}"
    )
    print(f"{engine} {case}: {worst}; {[finding.what for finding in told]}")
    if any("nobody has looked" in note.what for note in notes if not note.warning):
        pytest.skip(f"nothing is claimed of {case} in {engine}; {worst}")
    assert agrees is not bool(told), f"{worst}; check --target {engine} says {told}"


def test_the_comparison_means_something(built):
    for case, (home, _, _) in MIXTURES.items():
        folder, expected, _ = built(case)
        config = json.loads((folder / "config.json").read_text())
        if home != "remote":
            assert config["architectures"] == [families.load(home).architecture]
        assert expected.std() > 0.1, case

"""What planning and the start of a build cost grows with the number of tensors, and no faster.

Calls, comparisons and bytes are counted, not seconds: sparse files have headers and no weights.
"""

import json
import subprocess
import sys
import tracemalloc
from types import SimpleNamespace

import pytest
import yaml

from moeforge import engine
from moeforge.engine.jobs import jobs_of
from moeforge.engine.pool import Pool
from moeforge.engine.seal import Sealer
from moeforge.output.fingerprint import fingerprint
from moeforge.output.layout import index, lay_out
from moeforge.prepare import prepare

HIDDEN, WIDE = 64, 32


def checkpoint(folder, layers, experts):
    """A qwen3_moe, or a llama of no experts, in a file of a header and a hole."""
    parts = {"gate_proj": [WIDE, HIDDEN], "up_proj": [WIDE, HIDDEN], "down_proj": [HIDDEN, WIDE]}
    sizes = {"model.embed_tokens.weight": [99, HIDDEN], "model.norm.weight": [HIDDEN]}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        sizes |= {f"{at}self_attn.{x}_proj.weight": [HIDDEN, HIDDEN] for x in "qkvo"}
        sizes |= {f"{at}{x}_layernorm.weight": [HIDDEN] for x in ("input", "post_attention")}
        if experts:
            sizes[f"{at}mlp.gate.weight"] = [experts, HIDDEN]
        inside = [f"mlp.experts.{e}." for e in range(experts)] or ["mlp."]
        sizes |= {f"{at}{e}{p}.weight": size for e in inside for p, size in parts.items()}
    header, end = {}, 0
    for name, size in sizes.items():
        start, end = end, end + 2 * size[0] * (size[1:] or [1])[0]
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    config = {
        "model_type": "qwen3_moe" if experts else "llama",
        "architectures": ["Qwen3MoeForCausalLM" if experts else "LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "moe_intermediate_size": WIDE,
        "num_experts": experts,
        "num_experts_per_tok": 1,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 99,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def merge_of_mixtures(root, size):
    models = [checkpoint(root / f"moe-{size}-{i}", 2, 4 * size) for i in range(2)]
    entries = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
    return {"merge_method": "linear", "models": entries}


def mixture(root, size):
    models = [checkpoint(root / f"dense-{size}-{i}", 2, 0) for i in range(4 * size)]
    experts = [{"source_model": model} for model in models]
    return {"base_model": models[0], "gate_mode": "random", "experts": experts}


def stack(root, size):
    models = [checkpoint(root / f"layers-{size}-{i}", 8 * size, 0) for i in range(2)]
    sources = [{"model": model, "layer_range": [0, 8 * size]} for model in models]
    return {"merge_method": "passthrough", "slices": [{"sources": [each]} for each in sources]}


def begin(recipe):
    """Do what a build does before its first byte; return how many tensors it reads and writes."""
    prepared = prepare(recipe, offline=True)
    plan = prepared.plan
    shards = lay_out(plan.tensors, 40_000)
    fingerprint(plan, shards, "cpu", [])
    index(shards)
    engine.peak_memory(plan, engine.Settings())
    Sealer(None, shards, jobs_of(plan, shards, None), 2, lambda name, seal: None)
    return len(plan.tensors) + sum(len(source.specs()) for source in plan.sources.values())


def lines_of(act):
    """Count the lines of moeforge that are run, comprehensions' turns among them."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if "moeforge" not in frame.f_code.co_filename:
            return None
        count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
    return count


KINDS = [merge_of_mixtures, mixture, stack]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_work_before_the_first_byte_grows_as_tensors_do(kind, tmp_path):
    small, large = kind(tmp_path, 4), kind(tmp_path, 16)
    begin(small)  # what is read once per process is read
    few, many = begin(small), begin(large)
    assert many > 2.5 * few
    assert lines_of(lambda: begin(large)) / lines_of(lambda: begin(small)) < 1.02 * many / few


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_memory_before_the_first_byte_is_bounded_per_tensor(kind, tmp_path):
    small, large = kind(tmp_path, 4), kind(tmp_path, 16)
    begin(small)
    peaks, counts, said = [], [], []
    for recipe in (small, large):
        tracemalloc.start()
        counts.append(begin(recipe))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        said.append(engine.peak_memory(prepare(recipe, offline=True).plan, engine.Settings()))
    assert said[1] - said[0] >= peaks[1] - peaks[0]
    assert (peaks[1] - peaks[0]) / (counts[1] - counts[0]) < 2500


def test_a_build_has_more_files_open_than_a_shell_allows(tmp_path):
    """A trillion parameters are some 400 files to write and 800 to read; shells allow 1024."""
    recipe = tmp_path / "stack.yml"
    recipe.write_text(yaml.safe_dump(stack(tmp_path, 4)))
    command = f"ulimit -S -n 40; exec {sys.executable} -m moeforge build {recipe} --no-verify"
    command += f" -o {tmp_path / 'out'} --shard-size 40kB"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 60


def test_chunks_of_a_job_are_made_when_it_is_its_turn():
    made, done = [], []

    def chunks(number):
        for _ in range(10):
            made.append(number)
            yield lambda state, report: done.append(len(made) - len(done))

    jobs = [SimpleNamespace(chunks=lambda n=n: chunks(n), advance=lambda: False) for n in range(20)]
    Pool(1, lambda done: None).run(jobs, lambda: None)
    assert len(done) == 200
    assert made == sorted(made)
    assert max(done) <= 10

"""Anything at all is used or refused in words: recipes, headers, configs, tokenizers, adapters.

In the suite each test tries a bounded number of cases, always the same ones. `MOEFORGE_FUZZ=100`
tries a hundred times as many, others each time; see docs/hostile.md.
"""

import copy
import io
import json
import math
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import safetensors
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import save
from tiny import Maker, tokenizer
from zoo import ZOO

import moeforge
from moeforge import recipe as recipes
from moeforge.checking import origins
from moeforge.checking.compatibility import comparison_json, comparison_table
from moeforge.checking.explain import explained, explained_tables
from moeforge.errors import RecipeError, SourceError
from moeforge.sources.folder import INDEX, SINGLE
from moeforge.sources.header import read_header
from moeforge.tables import describe, plan_table

FACTOR = int(os.environ.get("MOEFORGE_FUZZ", "1"))
SECONDS = 20
"""Of the processor: no single case may take longer, on a busy machine either."""


def fuzz(examples):
    """Try `examples` cases: the same in every run of the suite, new ones in a long run."""
    return settings(
        max_examples=examples * FACTOR,
        deadline=None,
        derandomize=FACTOR == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


HUGE = st.sampled_from([2**31, 2**63, 10**30, 10**400, -(2**63), 10**9, 10**7, 1e308, -1e308])
ODD = st.one_of(
    HUGE,
    st.sampled_from([math.nan, math.inf, "", "abc", "\x1b[31m", "../../x", [], {}, None, True]),
    st.integers(-3, 5),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.one_of(st.integers(-1, 4), st.text(max_size=2), st.none()), max_size=5),
    st.lists(st.lists(st.integers(0, 3), max_size=2), max_size=3),
    st.dictionaries(st.text(max_size=3), st.one_of(st.integers(), st.none()), max_size=2),
    st.lists(st.sampled_from(["full_attention", "sliding_attention", "mamba"]), max_size=6),
)


def places(data, path=()):
    """Every path to a value in nested dicts and lists."""
    yield path
    if isinstance(data, dict):
        for key in data:
            yield from places(data[key], (*path, key))
    elif isinstance(data, list):
        for i in range(len(data)):
            yield from places(data[i], (*path, i))


@st.composite
def mutated(draw, originals, extra=(), values=ODD):
    """One of `originals` with one to three values replaced, removed, doubled or added."""
    data = copy.deepcopy(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([p for p in places(data) if p] or [()]))
        if not path:
            return copy.deepcopy(draw(values))
        holder = data
        for part in path[:-1]:
            holder = holder[part]
        act = draw(st.sampled_from(["replace"] * 6 + ["remove", "double", "add"]))
        if act == "remove":
            del holder[path[-1]]
        elif act == "double" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[path[-1]]))
        elif act == "add" and isinstance(holder, dict):
            key = draw(st.sampled_from(extra) if extra else st.text(max_size=8))
            holder[key] = copy.deepcopy(draw(values))
        else:
            holder[path[-1]] = copy.deepcopy(draw(values))
    return data


@st.composite
def scrambled(draw, texts):
    """One of `texts`, bytes, with a few of its bytes changed, cut out, repeated or inserted."""
    data = bytearray(draw(st.sampled_from(texts)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        span = draw(st.integers(0, 40))
        act = draw(st.sampled_from(["flip", "insert", "cut", "repeat", "move", "end"]))
        if act == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif act == "insert":
            known = [b"&a ", b"*a", b"<<: ", b"!!python/name:os ", b"[[", b"{{", b"\0", b"\xff\xfe"]
            known += [b"\t", b"- ", b'"', b"99999999999999999999", b"-1", b"null", b"1e999", b","]
            data[at:at] = draw(st.sampled_from(known))
        elif act == "cut":
            del data[at : at + span]
        elif act == "repeat":
            data[at:at] = data[at : at + span] * draw(st.integers(1, 5))
        elif act == "move":
            piece = data[at : at + span]
            del data[at : at + span]
            to = draw(st.integers(0, len(data)))
            data[to:to] = piece
        elif act == "end":
            del data[at:]
    return bytes(data)


def answered(recipe, **how):
    """What `check` reports; anything but a report, or a wait, is a failure."""
    began = time.process_time()
    report = moeforge.check(recipe, **how)
    if report.prepared is not None:
        described = describe(report.prepared, 10**9)
        plan, recipe = report.prepared.plan, report.prepared.loaded.recipe
        trees = origins.trees(origins.traced(plan, plan.tensors[-1].name))
        parts = [plan_table(plan, described), *explained_tables(explained(plan, recipe)), *trees]
        Console(file=io.StringIO()).print(*parts)
    if report.compared is not None:
        table = comparison_table(report.compared, report.compared.labels)
        Console(file=io.StringIO()).print(table)
        json.dumps(comparison_json(report.compared))
    assert time.process_time() - began < SECONDS
    assert all(str(f).replace("\n", "").isprintable() for f in (*report.errors, *report.notes))
    return report


# --- recipes -------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
TEXTS = [file.read_text() for file in sorted(ROOT.glob("recipes/**/*.yml"))]
for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))):
    TEXTS += re.findall(r"```ya?ml\n(.*?)```", page.read_text(), re.DOTALL)
SHIPPED = [data for text in TEXTS if isinstance(data := yaml.safe_load(text), dict)]


@fuzz(200)
@given(mutated(SHIPPED))
def test_recipes_that_are_nearly_right(data):
    if not isinstance(data, dict):
        return
    try:
        loaded = recipes.load(data)
    except RecipeError:
        return
    assert recipes.load(yaml.safe_load(loaded.document.text)).recipe == loaded.recipe


@fuzz(150)
@given(scrambled([text.encode() for text in TEXTS]))
def test_texts_of_recipes_that_were_damaged(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "scrambled.yml"
    path.write_bytes(data)
    began = time.process_time()
    try:
        recipes.load(path)
    except RecipeError as error:
        said = str(error)
    else:
        said = ""
    assert said.replace("\n", "").isprintable()
    assert time.process_time() - began < SECONDS


def mixture(base, *experts, **more):
    entries = [{"source_model": str(folder)} for folder in experts]
    return {"base_model": str(base), "experts": entries, "gate_mode": "random", **more}


def linear(*models, **more):
    inputs = [{"model": str(model), "parameters": {"weight": 1}} for model in models]
    return {"merge_method": "linear", "models": inputs, **more}


def stack(one, other):
    spans = [(one, [0, 2]), (other, [1, 3])]
    return {"slices": [{"sources": [{"model": str(m), "layer_range": r}]} for m, r in spans]}


@fuzz(80)
@given(st.data())
def test_recipes_of_real_models(llamas, data):
    one, other, _ = llamas
    originals = [
        mixture(one, one, other, experts_per_token=1, layers=[0, [1, 3]]),
        linear(one, other, dtype="bfloat16", tokenizer_source="union"),
        stack(one, other),
        {"merge_method": "slerp", "base_model": str(one), "parameters": {"t": [0, 0.5, 1]}}
        | {"models": [{"model": str(one)}, {"model": str(other)}]},
    ]
    recipe = data.draw(mutated(originals))
    if isinstance(recipe, dict):
        answered(recipe)


# --- headers -------------------------------------------------------------------------------------

REAL = save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.ones(0)})
DATA = 24 + 8
HEADER = json.loads(REAL[8 : 8 + int.from_bytes(REAL[:8], "little")])
CODES = st.sampled_from(["F32", "BF16", "F16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "f32", "X", 7])
SHAPES = st.lists(st.one_of(st.integers(-1, 6), HUGE), max_size=3)
OFFSETS = st.lists(st.one_of(st.integers(-1, DATA + 2), HUGE), min_size=1, max_size=3)
ENTRIES = st.fixed_dictionaries({"dtype": CODES, "shape": SHAPES, "data_offsets": OFFSETS})


@st.composite
def lies(draw):
    """A file whose header is made up, or a real one with a few values changed."""
    if draw(st.booleans()):
        header = draw(mutated([HEADER], extra=["__metadata__", "z", ""], values=ODD | ENTRIES))
    else:  # entries that fit together, so that something is left to be accepted
        header, at = {}, 0
        for name in draw(st.lists(st.text(max_size=5), max_size=4, unique=True)):
            size = draw(st.integers(0, 3))
            header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
            at += size
    text = json.dumps(header, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    text += b" " * draw(st.integers(0, 8))
    length = len(text) + draw(st.sampled_from([0] * 12 + [1, -1, 8, 2**40, 2**63]))
    ends = [e["data_offsets"][-1] for e in header.values() if is_entry(e)] if header else []
    size = max((end for end in ends if end <= 100), default=0) + draw(
        st.sampled_from([0] * 9 + [1])
    )
    return length.to_bytes(8, "little") + text + bytes(size)


def is_entry(entry):
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return isinstance(offsets, list) and bool(offsets) and isinstance(offsets[-1], int)


def reference(raw):
    """What safetensors' own reader finds, as {name: (dtype, shape, bytes)}, or why it refuses."""
    try:
        found = safetensors.deserialize(raw)
    except Exception as error:
        return str(error) or type(error).__name__
    return {n: (str(e["dtype"]), list(e["shape"]), bytes(e["data"])) for n, e in found}


STRICTER = (
    "impossible name",  # what would write on a terminal, or is empty
    "appears twice",  # the reference takes the last
    "below a byte",  # refused by name: packed numbers cannot be merged
    "unknown dtype",  # those that torch cannot compute with
    "unknown key",
    "is not JSON",
)
"""What we refuse and the reference implementation reads, by our words."""


def compare(raw, path):
    path.write_bytes(raw)
    theirs = reference(raw)
    try:
        entries = read_header(path)
    except SourceError as error:
        said = str(error)
        assert isinstance(theirs, str) or any(words in said for words in STRICTER), said
        assert said.replace("\n", "").isprintable()
        return
    assert isinstance(theirs, dict), f"the reference refuses it: {theirs}"
    mine = {
        name: (spec.dtype.code, list(spec.shape), raw[span.offset : span.offset + span.nbytes])
        for name, (spec, span) in entries.items()
    }
    assert mine == theirs


@fuzz(300)
@given(lies())
def test_headers_that_lie_are_read_as_safetensors_reads_them(tmp_path_factory, raw):
    compare(raw, tmp_path_factory.getbasetemp() / "lies.safetensors")


@fuzz(300)
@given(scrambled([REAL]))
def test_files_that_were_damaged_are_read_as_safetensors_reads_them(tmp_path_factory, raw):
    compare(raw, tmp_path_factory.getbasetemp() / "damaged.safetensors")


# --- configs, indexes, tokenizers, adapters ------------------------------------------------------

TYPES = ("llama", "qwen2", "phi3", "gemma4_text", "lfm2", "minicpm3", "granitemoehybrid", "mixtral")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A tiny checkpoint of each of some types, and a copy of each to damage."""
    make = Maker(tmp_path_factory.mktemp("zoo"))
    kinds = TYPES if FACTOR == 1 else (*TYPES, "qwen3_5_text", "cohere2", "granite", "gpt2")
    good = [make(kind, seed=1, with_tokenizer=False, **ZOO.get(kind, {})) for kind in kinds]
    return [(folder, make.copy(folder, f"{folder.name}-damaged")) for folder in good]


@fuzz(60)
@given(st.data())
def test_configs_of_real_models(zoo, data):
    configs = [json.loads((good / "config.json").read_text()) for good, _ in zoo]
    keys = sorted({key for config in configs for key in config} | {"quantization_config"})
    number = data.draw(st.integers(0, len(zoo) - 1))
    good, damaged = zoo[number]
    config = data.draw(mutated([configs[number]], extra=keys))
    (damaged / "config.json").write_text(json.dumps(config))
    target = data.draw(st.sampled_from([None, "vllm", "llama.cpp", "mlx", "transformers4"]))
    answered(mixture(damaged, damaged, good), target=target)
    answered(mixture(good, good, damaged), target=target)
    answered(mixture(damaged, damaged, damaged, architecture="remote"), target=target)
    answered(linear(damaged, good), target=target)
    answered(stack(damaged, good), target=target)


@fuzz(60)
@given(st.data())
def test_indexes_of_real_models(llamas, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "indexed"
    if not folder.exists():
        shutil.copytree(llamas[0], folder)
        (folder / SINGLE).rename(folder / "a.safetensors")
    names = list(read_header(folder / "a.safetensors"))
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names[:6], "a.safetensors")}
    paths = st.sampled_from(["../a.safetensors", "/dev/zero", "a.safetensors", ".", "config.json"])
    (folder / INDEX).write_text(json.dumps(data.draw(mutated([index], values=ODD | paths))))
    answered(linear(folder, llamas[0]))


@fuzz(60)
@given(st.data())
def test_tokenizers_of_real_models(llamas, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "spoken"
    if not folder.exists():
        shutil.copytree(llamas[0], folder)
    tokenizer().save_pretrained(folder)
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    original = json.loads((folder / name).read_text())
    if name == "tokenizer.json":  # most places would be in the long list of bytes
        original["model"]["vocab"] = dict(list(original["model"]["vocab"].items())[-4:])
    extra = ["added_tokens", "added_tokens_decoder", "extra_special_tokens", "chat_template"]
    broken = data.draw(mutated([original], extra=[*extra, "auto_map", "tokenizer_class"]))
    (folder / name).write_text(json.dumps(broken))
    for source in ("union", "base"):
        answered(linear(folder, llamas[1], tokenizer_source=source, base_model=str(folder)))
    answered(linear(folder, llamas[1], chat_template="auto"))


ADAPTER = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "rank_pattern": {"layers.1.*": 2},
    "alpha_pattern": {},
    "modules_to_save": None,
    "use_rslora": False,
    "base_model_name_or_path": "x",
    "bias": "none",
    "fan_in_fan_out": False,
}


@fuzz(60)
@given(st.data())
def test_adapters_of_real_models(llamas, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "adapter"
    folder.mkdir(exist_ok=True)
    stem = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    tensors = {f"{stem}A.weight": torch.ones(2, 64), f"{stem}B.weight": torch.ones(64, 2)}
    (folder / "adapter_model.safetensors").write_bytes(save(tensors))
    patterns = st.sampled_from([{"(a+)+$": 2}, {"(": 1}, {".*" * 30 + "x": 2}, "all-linear"])
    config = data.draw(mutated([ADAPTER], values=ODD | patterns))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    answered(linear(f"{llamas[0]}+{folder}", llamas[1]))

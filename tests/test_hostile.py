"""Attacks, one by one: nothing of a stranger's is run, followed, printed raw or waited for."""

import json
import os
import resource
import shutil
import signal
import time
from contextlib import suppress

import pytest
import torch
import warm
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from test_fuzz import linear, mixture, stack
from tiny import Maker, edit_config
from zoo import ZOO

import moeforge
from moeforge.errors import Finding, MoeforgeError

WEIGHTS = "model.safetensors"
NAN = torch.full((64,), float("nan"))


@pytest.fixture
def hurry():
    """Fail what waits: a pipe, a device, a question on the terminal."""

    def late(*_):
        raise TimeoutError("it waits")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)


@pytest.fixture
def stranger(llamas, tmp_path):
    """A copy of a llama, to make hostile."""
    return shutil.copytree(llamas[0], tmp_path / "stranger")


def said(recipe, *codes):
    """What `check` says against a recipe; the models are to blame unless `codes` say otherwise."""
    report = moeforge.check(recipe)
    assert report.exit_code in (codes or (3,)), report.errors
    text = "\n".join(map(str, report.errors))
    assert text.replace("\n", "").isprintable()
    assert len(text) < 3000
    return text


# --- configs: what the fuzz tests found first ----------------------------------------------------

CONFIGS = {
    # model type: {key: values that ended in a traceback, a hang or gigabytes of memory}
    "llama": {
        "num_hidden_layers": [10**9, -1, 1e308, "4", [4]],
        "hidden_size": ["abc", -1, [64], 1e308],
        "num_attention_heads": [[4], "4"],
        "rms_norm_eps": ["abc", [None], 10**400],
        "partial_rotary_factor": [1e308, [1]],
        "rope_parameters": [[1], 7, {"rope_theta": 1e4, "rope_type": [0]}],
        "intermediate_size": [["full_attention"], [None], "96", {}],
        "architectures": [{"a": 1}, [1]],
        "model_type": ["", 5],
        "mlp_only_layers": ["\x1b[31m"],
        "first_k_dense_replace": [[]],
        "full_attn_idxs": [0.5],
        "per_layer_config": [{"a": 1}],
        "hybrid_override_pattern": [10**30, [None]],
        "num_kv_shared_layers": ["\x1b[31m"],
        "scale_depth": [{"a": 1}],
        "eos_token_id": [0.5, "</s>"],
        "_attn_implementation": ["someone/kernels"],
    },
    "qwen2": {"layer_types": [10**9, ["full_attention"]], "sliding_window": ["\x1b[31m", {}]},
    "lfm2": {
        "block_multiple_of": [""],
        "block_ffn_dim_multiplier": [-1e308, "abc"],
        "layer_types": [[None], 0.5, {}],
    },
    "minicpm3": {
        "scale_emb": [[0], ""],
        "qk_nope_head_dim": [{}, 0.5, 10**30, 10**9],
        "dim_model_base": [[[]]],
    },
    "gemma4_text": {"num_kv_shared_layers": [None], "rms_norm_eps": ["x"], "layer_types": [{}]},
    "granite": {"attention_multiplier": [[None]], "embedding_multiplier": ["abc"]},
    "phi3": {"num_key_value_heads": [[1, 1]], "rope_scaling": [[1]]},
}
CASES = [
    (kind, key, value)
    for kind, keys in CONFIGS.items()
    for key, values in keys.items()
    for value in values
]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    make = Maker(tmp_path_factory.mktemp("zoo"))
    good = {k: make(k, seed=1, with_tokenizer=False, **ZOO.get(k, {})) for k in CONFIGS}
    return {kind: (folder, make.copy(folder, f"{kind}-odd")) for kind, folder in good.items()}


@pytest.mark.parametrize(("kind", "key", "value"), CASES)
def test_impossible_values_of_a_config_are_named(kind, key, value, zoo, hurry):
    good, odd = zoo[kind]
    config = json.loads((good / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, key: value}))
    for recipe in (mixture(odd, odd, good), linear(odd, good), stack(odd, good)):
        text = said(recipe)
        assert f"{odd / 'config.json'} says {key}: " in text
        assert "correct its config" in text


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "num_hidden_layers"])
def test_absent_sizes_are_named(key, zoo, hurry):
    for kind in ("llama", "minicpm3", "granite"):
        good, odd = zoo[kind]
        shutil.copy(good / "config.json", odd)
        edit_config(odd, **{key: None})
        assert key in said(mixture(odd, odd, good), 4)
        assert not moeforge.check(linear(good, good, good)).plan


def test_a_config_that_contradicts_the_tensors_is_named(zoo, hurry):
    good, odd = zoo["phi3"]
    shutil.copy(good / "config.json", odd)
    edit_config(odd, num_key_value_heads=4)
    assert "config.json does not fit the tensors" in said(mixture(good, good, odd))


# --- headers and other files ---------------------------------------------------------------------


def rewrite(folder, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(shape, end=0, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


HEADERS = {
    "terminal escapes": ({"\x1b]0;owned\x07": entry([0])}, r"impossible name '\x1b]0;owned\x07'"),
    "text backwards": ({"a\u202eb": entry([0])}, r"impossible name 'a\u202eb'"),
    "no name": ({"": entry([0])}, "impossible name ''"),
    "long name": ({"n" * 10**7: entry([0])}, "impossible name 'nnnn"),
    "huge product": ({"a": entry([2**62] * 60)}, "which takes"),
    "huge number": ({"a": entry([10**400])}, "impossible shape"),
    "many dimensions": ({"a": entry([2**62] * 10**5)}, "impossible shape"),
    "below a byte": ({"a": entry([2], 1, "F4")}, "a is F4, which is quantised below a byte"),
    "below a byte too": ({"a": entry([4], 3, "F6_E3M2")}, "quantised below a byte"),
    "dtype a list": ({"a": entry([0], dtype=["F32"] * 10**5)}, "unknown dtype"),
    "a number elsewhere": ({"a": {**entry([0]), "x": 10**400}}, "a has the unknown key 'x'"),
    "metadata": ({"__metadata__": {"a": {"b": 1}}}, "__metadata__"),
    "deep": (b'{"a":' + b"[" * 10**6, "not a readable safetensors file"),
    "byte order mark": (b"\xef\xbb\xbf{}", "not a JSON object"),
    "not UTF-8": (b'{"\xff":1}', "can't decode"),
    "NaN": (b'{"a":NaN}', "NaN is not JSON"),
    "many digits": (b'{"a":' + b"9" * 10**5 + b"}", "not a readable safetensors file"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_attack_are_refused(kind, stranger, llamas, hurry):
    header, words = HEADERS[kind]
    rewrite(stranger, header)
    text = said(linear(stranger, llamas[1]))
    assert str(stranger / WEIGHTS) in text
    assert words in text


def test_a_header_of_a_gigabyte_is_not_read(stranger, llamas, hurry):
    with (stranger / WEIGHTS).open("wb") as file:
        file.write((10**9).to_bytes(8, "little"))
        file.truncate(2 * 10**9)  # a hole on disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert f"cannot have a header of {10**9} bytes" in said(linear(stranger, llamas[1]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_files_that_are_none_are_not_waited_for(name, kind, stranger, llamas, hurry):
    (stranger / name).unlink()
    if kind == "pipe":
        os.mkfifo(stranger / name)
    elif kind == "device":
        (stranger / name).symlink_to("/dev/zero")
    else:
        (stranger / name).mkdir()
    text = said(linear(stranger, llamas[1], tokenizer_source="union"), 3, 4)
    assert name in text
    assert "it is a folder" in text or "not a regular file" in text


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "binary", "huge"])
def test_recipes_that_are_none_are_not_waited_for(kind, tmp_path, hurry):
    path = tmp_path / "recipe.yml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "binary":
        path.write_bytes(bytes(range(128, 256)))
    else:
        path.write_text("- a\n" * 10**6)
    assert f"cannot read the recipe {path}: " in said(path, 2)


def test_prompts_that_are_none_are_not_waited_for_nor_shown(llamas, tmp_path, hurry):
    recipe = mixture(llamas[0], llamas[0], llamas[1], gate_mode="hidden")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "shadow").write_text("root:secret")
    (tmp_path / "shadow.jsonl").write_text("root:secret")
    for name, words in (
        ("pipe.txt", "not a regular file"),
        ("shadow", "ends in .txt or .jsonl"),
        ("shadow.jsonl", "not JSON"),
    ):
        recipe["experts"][0]["prompts_file"] = str(tmp_path / name)
        text = said(recipe, 4)
        assert words in text
        assert "secret" not in text


MODELS = (
    "--help",
    "-rf",
    "..",
    "../../x",
    "a/b/c",
    "a b",
    "模型",
    "x" * 5000,
    "a\0b",
    "a/b@..",
    "~x",
)


@pytest.mark.parametrize("model", MODELS)
def test_names_that_are_no_models(model, tmp_path, monkeypatch, hurry):
    monkeypatch.chdir(tmp_path)
    report = moeforge.check(linear(model, "also/absent"))
    assert report.exit_code in (2, 3, 6)
    assert all(str(f).replace("\n", "").isprintable() for f in report.errors)


@pytest.mark.parametrize("text", ["\x1b[2J", "\x9b31m", "a\rb", "a\u202eb", "\x07"])
def test_messages_cannot_move_the_cursor(text):
    shown = str(Finding(f"what {text}", f"fix {text}\nsecond line", ("a", text)))
    assert shown.replace("\n", "").isprintable()
    assert "second line" in shown


def test_messages_keep_letters_of_all_languages():
    assert str(Finding("größe 模型 — é")) == "größe 模型 — é"


# --- links ---------------------------------------------------------------------------------------


def test_a_link_to_a_private_file_is_not_copied(stranger, llamas, tmp_path):
    secret = tmp_path / "id_rsa"
    secret.write_text("PRIVATE KEY")
    (stranger / "tokenizer.model").symlink_to(secret)
    for more in ({}, {"tokenizer_source": str(stranger)}):
        with pytest.raises(MoeforgeError, match=r"is a link to .*id_rsa"):
            moeforge.build(linear(stranger, llamas[1], **more), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_link_in_a_module_folder_is_not_copied(stranger, llamas, tmp_path):
    (tmp_path / "ssh").mkdir()
    (tmp_path / "ssh" / "id_rsa").write_text("PRIVATE KEY")
    (stranger / "1_Pooling").mkdir()
    (stranger / "1_Pooling" / "more").symlink_to(tmp_path / "ssh")
    (stranger / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]')
    with pytest.raises(MoeforgeError, match=r"is a link to .*ssh"):
        moeforge.build(linear(stranger, llamas[1]), tmp_path / "out")


def test_links_of_people_and_of_the_cache_are_followed(stranger, llamas, tmp_path):
    """One tokenizer shared by hand, and a folder as huggingface_hub lays it out."""
    repo = tmp_path / "models--me--x"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, file in enumerate(sorted(stranger.iterdir())):
        shutil.move(file, repo / "blobs" / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(llamas[1] / "tokenizer.json")
    moeforge.build(linear(snapshot, llamas[1]), tmp_path / "out")
    copied = tmp_path / "out" / "tokenizer.json"
    assert not copied.is_symlink()
    assert copied.read_bytes() == (llamas[1] / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()


# --- code ----------------------------------------------------------------------------------------

EVIL = "import pathlib\npathlib.Path({sentinel!r}).touch()\nclass Evil: pass\n"
COMMANDS = {
    "eval": "from moeforge.proof.perplexity import compare; compare([{model!r}], [T])",
    "route": "from moeforge.proof.routing_of import route; route({model!r}, [T])",
    "tune": "from moeforge import tuning; from moeforge.recipe import parse_tuning; "
    "tuning.tune(Path({model!r}), Path({out!r}), parse_tuning(dict(text=[str(T)])))",
    "embed": "from moeforge.prompting.embed import embedder; embedder({model!r})(['a'])",
}


def with_code(folder, sentinel, kind, *, tokenizer):
    """Let the config, and the tokenizer too, name code that lies beside them."""
    (folder / "evil.py").write_text(EVIL.format(sentinel=str(sentinel)))
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoModel")
    edit_config(folder, model_type=kind, auto_map=dict.fromkeys(names, "evil.Evil"))
    if not tokenizer:
        return
    (folder / "tokenizer.json").unlink()  # or else nobody would look for another kind
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    path.write_text(json.dumps({**config, "tokenizer_class": "Evil"}))


@pytest.mark.parametrize("tokenizer", [True, False], ids=["tokenizer", "config"])
@pytest.mark.parametrize("kind", ["llama", "strange"])
def test_code_of_a_model_is_never_run_unasked(kind, tokenizer, stranger, llamas, tmp_path, hurry):
    sentinel = tmp_path / "ran"
    with_code(stranger, sentinel, kind, tokenizer=tokenizer)
    text = tmp_path / "text.txt"
    text.write_text("one\n\ntwo\n\nthree")
    prompts = {"gate_mode": "hidden"}
    recipes = [
        linear(stranger, stranger, merge_method="passthrough", tokenizer_source="base"),
        linear(stranger, llamas[1], tokenizer_source="union", base_model=str(stranger)),
        stack(stranger, stranger),
        mixture(stranger, stranger, llamas[1], **prompts),
        mixture(stranger, stranger, stranger, architecture="remote"),
    ]
    for expert, word in zip(recipes[3]["experts"], ("a", "b"), strict=True):
        expert["positive_prompts"] = [word]
    for number, recipe in enumerate(recipes):
        moeforge.check(recipe)
        with suppress(MoeforgeError):
            moeforge.build(recipe, tmp_path / f"out{number}")
    for command in COMMANDS.values():
        code = command.format(model=str(stranger), out=str(tmp_path / "tuned"))
        with suppress(MoeforgeError):
            exec(code, {"T": text, "Path": type(text)})
    assert not sentinel.exists()


def every_command(root):
    """What a user can do with a model of a stranger, by name of the command."""
    model, text = str(root / "stranger"), str(root / "text.txt")
    lock = str(root / "built" / "moeforge.lock.json")
    embedder, experts = f"--embedding-model {model}", f"--expert {model} --expert {model}"
    recipes = {command: [command, str(root / "recipe.yml")] for command in ("check", "plan")}
    return {
        **recipes,
        "build": ["build", str(root / "recipe.yml"), "-o", str(root / "made")],
        "inspect": ["inspect", model],
        "show": ["show", "families"],
        "card": ["card", model],
        "new": ["new", "upscale", "-m", model, "-o", str(root / "new" / "upscale.yml")],
        "schema": ["schema", "-o", str(root / "new" / "schema.json")],
        "push": ["push", model, "owner/name"],
        "route": ["route", model, "--prompts", text],
        "tune": ["tune", model, "--text", text, "-o", str(root / "tuned")],
        "extract": ["extract", model, "--expert", "0", "-o", str(root / "dense")],
        "experts": ["experts", model, "--keep", "0", "-o", str(root / "fewer")],
        "upcycle": ["upcycle", model, "--experts", "2", "-o", str(root / "mixture")],
        "verify": ["verify", model, "--forward"],
        "rebuild": ["rebuild", lock, "-o", str(root / "again")],
        "diff": ["diff", model, model],
        "eval": ["eval", model, "--text", text],
        "select": f"prompts select {text} {text} -k 1 {embedder} -o {root}/chosen".split(),
        "cluster": f"prompts cluster {text} {experts} {embedder} -o {root}/piles".split(),
    }


@pytest.mark.parametrize("kind", ["llama", "strange"])
def test_no_command_runs_the_code_of_a_model(kind, stranger, llamas, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from moeforge.cli import app, prompts

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    recipe = linear(stranger, llamas[1], merge_method="linear")
    moeforge.build(recipe, tmp_path / "built", verify=False)
    sentinel = tmp_path / "ran"
    with_code(stranger, sentinel, kind, tokenizer=True)
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe))
    (tmp_path / "text.txt").write_text("one\n\ntwo\n\nthree")
    commands = every_command(tmp_path)
    known = {c.name or c.callback.__name__ for c in app.registered_commands}
    known |= {c.name or c.callback.__name__ for c in prompts.app.registered_commands}
    assert known <= commands.keys(), "a new command needs a line above"
    for name, arguments in commands.items():
        done = CliRunner().invoke(app, arguments)
        assert "Traceback" not in done.output, name
        assert "mistake in moeforge" not in done.output, f"{name}: {done.output}"
        assert not sentinel.exists(), name


def test_a_token_is_in_no_output_and_no_file(llamas, tmp_path):
    """Of builds that end well and badly, in words, as JSON, with tracebacks."""
    token = "hf_averysecrettokenofsomebody"
    spoilt = tmp_path / "spoilt"
    shutil.copytree(llamas[0], spoilt)
    save_file({**load_file(spoilt / WEIGHTS), "model.norm.weight": NAN}, spoilt / WEIGHTS)
    good = {**linear(*llamas[:2]), "seed": 1}
    for name, recipe in {"good": good, "bad": linear(spoilt, llamas[1])}.items():
        (tmp_path / f"{name}.yml").write_text(json.dumps(recipe))
    env = {**os.environ, "HF_TOKEN": token, "HUGGING_FACE_HUB_TOKEN": token}
    for name, before, after in (
        ("good", [], ["--json"]),
        ("bad", ["--debug"], []),
        ("bad", ["--debug"], ["--json"]),
    ):
        words = [*before, "build", f"{name}.yml", "-o", name, "--no-verify", *after]
        done = warm.moeforge(*words, cwd=tmp_path, env=env)
        assert done.returncode == (5 if name == "bad" else 0), done.stderr
        assert ("Traceback" in done.stderr) == (name == "bad")
        assert token not in done.stdout + done.stderr
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any(file.name == "moeforge.lock.json" for file in written)
    assert not [file for file in written if token.encode() in file.read_bytes()]


def test_the_sentinel_is_tripped_where_code_is_trusted(stranger, tmp_path, hurry):
    """Else the test above could not fail."""
    with_code(stranger, tmp_path / "ran", "strange", tokenizer=False)
    (tmp_path / "text.txt").write_text("one two three")
    from moeforge.proof.perplexity import compare

    with pytest.raises(Exception):  # noqa: B017, PT011 - the class in it is no model
        compare([str(stranger)], [tmp_path / "text.txt"], trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_a_chat_template_cannot_leave_the_sandbox(stranger, llamas, tmp_path, hurry):
    sentinel = tmp_path / "ran"
    attack = f"{{{{ cycler.__init__.__globals__.os.mkdir('{sentinel}') }}}}"
    (stranger / "chat_template.jinja").write_text(attack)
    recipe = mixture(stranger, stranger, llamas[1], gate_mode="hidden")
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}')
    for expert in recipe["experts"]:
        expert["prompts_file"] = str(tmp_path / "chat.jsonl")
    recipe["experts"][1]["positive_prompts"] = ["other"]
    assert not moeforge.check(recipe).errors
    with pytest.raises(MoeforgeError, match="chat template"):
        moeforge.build(recipe, tmp_path / "out")
    assert not sentinel.exists()


# --- adapters, tokenizers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(.|.)*x", ".*" * 30 + "x", "((((a{9}){9}){9}){9}){9}"]
)
def test_patterns_of_adapters_cannot_take_for_ever(pattern, llamas, tmp_path, hurry):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "rank_pattern": {pattern: 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    rewrite(tmp_path, {})
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.safetensors")
    text = said(linear(f"{llamas[0]}+{tmp_path}", llamas[1]), 4)
    assert "it repeats too much to be matched in time" in text


@pytest.mark.parametrize("saved", [2**31, "lm_head", [7]])
def test_modules_that_an_adapter_does_not_name_are_refused(saved, llamas, tmp_path):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "modules_to_save": saved}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    rewrite(tmp_path, {})
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.safetensors")
    assert "not a list of names" in said(linear(f"{llamas[0]}+{tmp_path}", llamas[1]), 4)


@pytest.mark.parametrize("key", ["lora_alpha", "r"])
@pytest.mark.parametrize("value", [10**400, float("inf"), float("nan"), -(10**30)])
def test_impossible_numbers_of_an_adapter_are_named(key, value, llamas, tmp_path):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, key: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    rewrite(tmp_path, {})
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.safetensors")
    assert f"{key} is {repr(value)[:60]}" in said(linear(f"{llamas[0]}+{tmp_path}", llamas[1]), 4)


TOKENIZERS = {
    "ids of another kind": ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": "0"}}}),
    "no ids": ("tokenizer.json", {"model": {"vocab": {"a": None}}}),
    "pieces without scores": ("tokenizer.json", {"model": {"vocab": ["a"]}}),
    "merges of three": (
        "tokenizer.json",
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b", "c"]]}},
    ),
    "a processor of lists": (
        "tokenizer.json",
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "special_tokens": {"<s>": {"tokens": [["<s>"]]}},
            }
        },
    ),
    "added tokens without ids": ("tokenizer.json", {"added_tokens": [{"content": "a"}]}),
    "added tokens of numbers": ("tokenizer.json", {"added_tokens": 7}),
    "a decoder by names": ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_damaged_tokenizers_are_named(kind, stranger, llamas):
    name, change = TOKENIZERS[kind]
    path = stranger / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    recipe = linear(stranger, llamas[1], tokenizer_source="union", base_model=str(stranger))
    text = said(recipe, 4)
    assert name in text


# --- tokens --------------------------------------------------------------------------------------


def test_tokens_are_nowhere_but_in_requests(llamas, tmp_path):
    def run(*arguments, token, code):
        env = {**hub.env(tmp_path / "home", token=token), "HF_HUB_OFFLINE": "0"}
        done = warm.moeforge(*arguments, env=env)
        assert done.returncode == code, done.stderr
        assert token not in done.stdout + done.stderr

    with HubServer() as hub:
        small = {file.name: file.read_bytes() for file in llamas[0].iterdir()}
        hub.add("me/secret", small, private=True)
        recipe, out = tmp_path / "recipe.yml", tmp_path / "out"
        recipe.write_text(json.dumps(linear("me/secret", llamas[1])))
        run("build", recipe, "-o", out, "-v", token=hub.token, code=0)
        run("push", out, "me/new", "--no-verify", token=hub.token, code=0)
        run("push", out, "you/new", token=hub.token, code=6)
        assert {hub.token} <= {request.token for request in hub.requests}
    assert load_file(out / WEIGHTS)
    for file in out.rglob("*"):
        assert hub.token.encode() not in (file.read_bytes() if file.is_file() else b""), file


def test_an_index_of_very_many_shards_takes_no_time(stranger, llamas, hurry):
    shard = {f"t{i}": f"model-{i}.safetensors" for i in range(3 * 10**5)}
    (stranger / WEIGHTS).unlink()
    index = json.dumps({"weight_map": shard})
    (stranger / "model.safetensors.index.json").write_text(index)
    began = time.monotonic()
    assert "No such file" in said(linear(stranger, llamas[1]))
    assert time.monotonic() - began < 15

"""The real huggingface_hub client, in a process of its own, against a Hub in miniature."""

from __future__ import annotations

import inspect
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer

ROOT = Path(__file__).parent.parent
WEIGHTS = r"GET .*(safetensors|\.bin|\.gguf)$"
SPECS = {name: ["bfloat16", [64, 320]] for name in "abcd"}


def pack(names: str, seed: int = 0) -> bytes:
    """Return a safetensors file with tensors of 40 kB of noise."""
    header, data = {}, random.Random(seed).randbytes(len(names) * 40960)
    for i, name in enumerate(names):
        offsets = [i * 40960, (i + 1) * 40960]
        header[name] = {"dtype": "BF16", "shape": [64, 320], "data_offsets": offsets}
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def header_bytes(file: bytes) -> int:
    return 8 + int.from_bytes(file[:8], "little")


def tensor(file: bytes, index: int) -> bytes:
    start = header_bytes(file) + index * 40960
    return file[start : start + 40960]


SMALL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "tokenizer.model": b"pieces",
    "chat_template.jinja": b"{{ x }}",
    "README.md": b"---\nlicense: mit\n---\n",
    "LICENSE": b"MIT",
}
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = json.dumps({"weight_map": {"a": ONE, "b": ONE, "c": TWO, "d": TWO}}).encode()
SINGLE = {**SMALL, "model.safetensors": pack("abcd")}
SHARDED = {
    **SMALL,
    ONE: pack("ab", 1),
    TWO: pack("cd", 2),
    "model.safetensors.index.json": INDEX,
}
CLUTTER = {
    "consolidated.safetensors": pack("abcd", 3),
    "pytorch_model.bin": b"pickle",
    "original/params.json": b"{}",
    "original/config.json": b'{"model_type": "other"}',
    "onnx/model.safetensors": pack("z"),
}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


# What runs in the client's process. `ask` takes the source of these functions along.


def plan(model: str, **where: Any) -> Any:
    from moeforge.sources import open_source

    source = open_source(model, **where)
    specs = {name: [spec.dtype.name, list(spec.shape)] for name, spec in source.specs().items()}
    files = sorted(file.name for file in source.folder.iterdir())
    return {"config": source.config, "specs": specs, "files": files, "commit": source.commit}


def fetch(model: str, names: str, **where: Any) -> Any:
    from moeforge.sources import open_source

    source = open_source(model, **where)
    found = {}
    for name in names:
        span = source.locate(name)
        on_disk = span.path.read_bytes()[span.offset : span.offset + span.nbytes]
        out = bytearray(span.nbytes - 10)
        source.read(name, 10, memoryview(out))
        assert on_disk[10:] == out
        found[name] = on_disk.hex()
    return found


def send(folder: str, repo_id: str, **options: Any) -> Any:
    from pathlib import Path

    from moeforge.output.push import push

    return push(Path(folder), repo_id, **options)


def attempt(function: Callable[..., Any], calls: list[Any]) -> Any:
    from moeforge.errors import MoeforgeError

    results = []
    for args, options in calls:
        try:
            results.append(["", function(*args, **options)])
        except MoeforgeError as error:
            results.append([type(error).__name__, str(error)])
    return results


def ask_many(
    env: dict[str, str], function: Callable[..., Any], calls: list[Any]
) -> list[list[Any]]:
    """Call `function` for each of [args, options]; return [error type or "", result or text]."""
    # Between retries huggingface_hub waits for seconds.
    code = ["import sys, json, time", "from typing import *", "time.sleep = lambda _: None"]
    code += ["from collections.abc import Callable"]
    code += [inspect.getsource(part) for part in (function, attempt)]
    code += [f"calls = json.load(sys.stdin)\nresults = attempt({function.__name__}, calls)"]
    code += ["print('\\n' + json.dumps(results))"]
    command = [sys.executable, "-W", "ignore", "-c", "\n".join(code)]
    done = subprocess.run(
        command, env=env, input=json.dumps(calls), capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def ask(env: dict[str, str], function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call `function` in a process of its own; return its result."""
    [[error, result]] = ask_many(env, function, [[args, options]])
    assert not error, result
    return result


def fails(env: dict[str, str], function: Callable[..., Any], *args: Any, **options: Any) -> str:
    """Call `function` in a process of its own; return `type: text` of the error it must raise."""
    [[error, result]] = ask_many(env, function, [[args, options]])
    assert error, result
    return f"{error}: {result}"


# Reading


def test_planning_fetches_small_files_and_headers_only(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add("me/moe", {**SHARDED, **CLUTTER})
    found = ask(hub.env(tmp_path), plan, "me/moe")
    assert found["config"] == {"model_type": "llama"}
    assert found["specs"] == SPECS
    assert found["commit"] == commit
    assert found["files"] == sorted([*SMALL, "model.safetensors.index.json"])
    assert hub.sent(WEIGHTS) == header_bytes(SHARDED[ONE]) + header_bytes(SHARDED[TWO])
    assert not hub.asked("consolidated|original|onnx|bin$")


def test_weights_come_with_the_first_read_and_only_once(hub: HubServer, tmp_path: Path) -> None:
    hub.add("me/moe", {**SHARDED, **CLUTTER})
    env = hub.env(tmp_path)
    ask(env, plan, "me/moe")
    hub.requests.clear()
    expected = {"a": tensor(SHARDED[ONE], 0).hex(), "d": tensor(SHARDED[TWO], 1).hex()}
    assert ask(env, fetch, "me/moe", "ad") == expected
    whole = [r for r in hub.asked(WEIGHTS) if not r.range]
    assert sum(r.sent for r in whole) == len(SHARDED[ONE]) + len(SHARDED[TWO])
    assert not hub.asked("consolidated|original|onnx|bin$")
    hub.requests.clear()
    assert ask(env, fetch, "me/moe", "ad") == expected
    assert ask(env, plan, "me/moe")["specs"] == SPECS
    assert not hub.asked("/resolve/|/cdn/")


def test_a_single_file_is_preferred_to_shards(hub: HubServer, tmp_path: Path) -> None:
    hub.add("me/both", {**SHARDED, **SINGLE})
    found = ask(hub.env(tmp_path), fetch, "me/both", "c")
    assert found == {"c": tensor(SINGLE["model.safetensors"], 2).hex()}
    assert not hub.asked(r"/model-0000\d")


def test_subfolder(hub: HubServer, tmp_path: Path) -> None:
    inner = {f"deep/er/{path}": data for path, data in SHARDED.items()}
    hub.add("me/nested", {**inner, **SINGLE, "deep/er/still/config.json": b"{}"})
    env = hub.env(tmp_path)
    found = ask(env, plan, "me/nested", subfolder="deep/er")
    assert found["specs"] == SPECS
    assert found["files"] == sorted([*SMALL, "model.safetensors.index.json"])
    assert ask(env, fetch, "me/nested", "b", subfolder="./deep/er/") == {
        "b": tensor(SHARDED[ONE], 1).hex()
    }
    assert not hub.asked("main/config.json|still|/model.safetensors$")


def test_branch_and_commit_can_be_named(hub: HubServer, tmp_path: Path) -> None:
    old = hub.add("me/moving", SINGLE)
    hub.add("me/moving", SHARDED, branch="refs/pr/1")
    hub.add("me/moving", {**SMALL, "model.safetensors": pack("abcd", 9)})
    env = hub.env(tmp_path)
    found = ask(env, fetch, "me/moving", "a", revision=old)
    assert found == {"a": tensor(SINGLE["model.safetensors"], 0).hex()}
    found = ask(env, fetch, "me/moving", "a", revision="refs/pr/1")
    assert found == {"a": tensor(SHARDED[ONE], 0).hex()}


def read_while_the_branch_moves(model: str) -> Any:
    import json

    from huggingface_hub import HfApi

    from moeforge.sources import open_source

    source = open_source(model)
    index = json.dumps({"weight_map": {}}).encode()
    HfApi().upload_file(
        path_or_fileobj=index, path_in_repo="model.safetensors.index.json", repo_id=model
    )
    HfApi().delete_file("model-00002-of-00002.safetensors", model)
    out = bytearray(source.specs()["d"].nbytes)
    source.read("d", 0, memoryview(out))
    return [source.commit, out.hex()]


def test_the_revision_is_resolved_once(hub: HubServer, tmp_path: Path) -> None:
    old = hub.add("me/moving", SHARDED)
    found = ask(hub.env(tmp_path, token=hub.token), read_while_the_branch_moves, "me/moving")
    assert found == [old, tensor(SHARDED[TWO], 1).hex()]
    assert TWO not in hub.files("me/moving")
    assert len(hub.asked("GET /api/models/me/moving(/revision/main)?$")) == 1


@pytest.mark.parametrize("by_variable", [True, False])
def test_offline_from_the_cache(hub: HubServer, tmp_path: Path, by_variable: bool) -> None:
    hub.add("me/moe", SHARDED)
    ask(hub.env(tmp_path), fetch, "me/moe", "a")
    hub.requests.clear()
    env = hub.env(tmp_path, HF_HUB_OFFLINE="1") if by_variable else hub.env(tmp_path)
    offline = {} if by_variable else {"offline": True}
    found = ask(env, fetch, "me/moe", "c", **offline)
    assert found == {"c": tensor(SHARDED[TWO], 0).hex()}
    assert not hub.requests


def fill_like_another_program(model: str) -> None:
    from huggingface_hub import hf_hub_download, snapshot_download

    snapshot_download(model, allow_patterns=["config.json"])
    hf_hub_download(model, "model.safetensors")


def test_offline_with_the_cache_of_another_program(hub: HubServer, tmp_path: Path) -> None:
    hub.add("me/moe", {**SINGLE, **CLUTTER})
    env = hub.env(tmp_path)
    ask(env, fill_like_another_program, "me/moe")
    assert ask(env, plan, "me/moe", offline=True)["specs"] == SPECS


def test_offline_without_the_files(hub: HubServer, tmp_path: Path) -> None:
    hub.add("me/single", SINGLE)
    hub.add("me/sharded", SHARDED)
    env = hub.env(tmp_path)
    assert fails(env, plan, "me/single", offline=True) == (
        "HubError: me/single: offline mode is on, and it is not in the cache\n"
        "    Go online once, or fetch it with `hf download`."
    )
    ask_many(env, plan, [[["me/single"], {}], [["me/sharded"], {}]])
    hub.requests.clear()
    env = hub.env(tmp_path, HF_HUB_OFFLINE="1")
    single, sharded = ask_many(env, plan, [[["me/single"], {}], [["me/sharded"], {}]])
    assert single == [
        "HubError",
        "me/single: offline mode is on, and model.safetensors is not in the cache\n"
        "    Go online once, or fetch it with `hf download me/single`.",
    ]
    assert sharded[0] == "HubError"
    assert f"{ONE} is not in the cache" in sharded[1]
    assert not hub.requests


def test_a_server_without_ranges_is_hung_up_on(hub: HubServer, tmp_path: Path) -> None:
    hub.ranges = False
    hub.add("me/moe", SHARDED)
    assert ask(hub.env(tmp_path), plan, "me/moe")["specs"] == SPECS


def test_the_token_opens_private_models_and_stays_on_the_hub(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.add("me/secret", SHARDED, private=True)
    env = hub.env(tmp_path, token=hub.token)
    assert ask(env, fetch, "me/secret", "a") == {"a": tensor(SHARDED[ONE], 0).hex()}
    assert {r.token for r in hub.asked("/cdn/")} == {""}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Every way in which opening and planning fails, as {name: "type: text"}."""
    lying = bytearray(SINGLE["model.safetensors"])
    lying[:8] = (1 << 40).to_bytes(8, "little")
    overlap = SINGLE["model.safetensors"].replace(b"40960, 81920", b"40961, 81921")
    lost = INDEX.replace(b'"d"', b'"e"')
    with HubServer() as hub:
        hub.add("me/good", SINGLE)
        hub.add("me/private", SINGLE, private=True)
        hub.add("me/gated", SINGLE, gated=True)
        hub.add("me/lora", {"adapter_config.json": b"{}", "adapter_model.safetensors": b""})
        hub.add("me/gguf", {"README.md": b"", "q4.gguf": b"GGUF"})
        hub.add("me/pickle", {**SMALL, "pytorch_model.bin": b"pickle"})
        hub.add("me/short", {**SMALL, "model.safetensors": SINGLE["model.safetensors"][:-1]})
        hub.add("me/lying", {**SMALL, "model.safetensors": bytes(lying)})
        hub.add("me/overlap", {**SMALL, "model.safetensors": overlap})
        hub.add("me/absent", {path: data for path, data in SHARDED.items() if path != TWO})
        hub.add("me/lost", {**SHARDED, "model.safetensors.index.json": lost})
        hub.add("me/unmapped", {**SHARDED, "model.safetensors.index.json": b'{"weight_map": 1}'})
        hub.add("me/broken", SINGLE)
        hub.add("me/dropped", SINGLE)
        hub.add("me/forbidden", SINGLE)
        hub.fail("GET /api/models/me/broken", 503, "in maintenance")
        hub.fail("GET /me/dropped/resolve/.*safetensors", 0)
        hub.fail("GET /api/models/me/forbidden/tree", 403, "your plan does not\nallow it")
        names = [name.partition("/")[2] for name in hub.repos]
        calls = {name: [[f"me/{name}"], {}] for name in names if name != "good"}
        calls["nowhere"] = [["me/nowhere"], {}]
        calls["revision"] = [["me/good"], {"revision": "v2"}]
        calls["commit"] = [["me/good"], {"revision": "0" * 40}]
        calls["subfolder"] = [["me/good"], {"subfolder": "deep"}]
        calls["outside"] = [["me/good"], {"subfolder": "../.."}]
        calls["id"] = [["me/a--b"], {}]
        env = hub.env(tmp_path_factory.mktemp("home"))
        results = ask_many(env, plan, list(calls.values()))
        yield {name: f"{kind}: {text}" for name, (kind, text) in zip(calls, results, strict=True)}
        assert sum(r.sent for r in hub.asked(WEIGHTS) if not r.range) == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nowhere", ["HubError: me/nowhere: there is no such repository", "hf auth login"]),
        ("private", ["HubError: me/private: there is no such repository", "hf auth login"]),
        ("gated", ["HubError: me/gated: access is restricted", "Ask for access on its page"]),
        ("revision", ["HubError: me/good@v2: there is no such revision", "branches and tags"]),
        ("commit", ["HubError: me/good@000", "there is no such revision", "branches and tags"]),
        ("subfolder", ["HubError: me/good/deep: there is no such file or folder", "its page"]),
        ("outside", ["SourceError: ../.. is not a folder inside me/good", "relative to"]),
        ("id", ["HubError: me/a--b: ", "a--b", "Correct what it names"]),
        (
            "broken",
            ["HubError: me/broken: the Hub answered 503: in maintenance", "Try again later"],
        ),
        (
            "dropped",
            ["HubError: me/dropped, header of model.safetensors: the connection", "network"],
        ),
        (
            "forbidden",
            ["HubError: me/forbidden: the Hub answered 403: your plan does not allow it"],
        ),
        ("lora", ["SourceError: me/lora is a LoRA adapter", "Merge the adapter"]),
        ("gguf", ["SourceError: me/gguf holds GGUF files", "original safetensors"]),
        ("pickle", ["SourceError: me/pickle has no model.safetensors", "pytorch_model.bin"]),
        ("short", ["SourceError: me/short: model.safetensors is not", "not downloaded whole"]),
        ("lying", ["SourceError: me/lying: model.safetensors is not", "1099511627776 bytes"]),
        (
            "overlap",
            ["SourceError: me/overlap: model.safetensors is not", "b starts at byte 40961"],
        ),
        ("absent", ["SourceError: me/absent", f"names {TWO}, which the repository does not have"]),
        ("lost", ["SourceError: me/lost: the index lists 1 tensors that no file has, first e"]),
        ("unmapped", ["SourceError: me/unmapped", "has no weight_map"]),
    ],
)
def test_refusals_say_what_and_what_to_do(
    refusals: dict[str, str], name: str, expected: list[str]
) -> None:
    assert refusals[name].startswith(expected[0])
    assert all(part in refusals[name] for part in expected)


def test_a_download_that_breaks(hub: HubServer, tmp_path: Path) -> None:
    hub.add("me/moe", SINGLE)
    env = hub.env(tmp_path)
    ask(env, plan, "me/moe")
    hub.fail("GET /cdn/", 0)
    text = fails(env, fetch, "me/moe", "a")
    assert text.startswith("HubError: me/moe: the connection to the Hub failed (")
    assert "Check network, proxy and HF_ENDPOINT" in text
    hub.faults.clear()
    assert ask(env, fetch, "me/moe", "a")


def test_no_connection(hub: HubServer, tmp_path: Path) -> None:
    hub.add("me/moe", SINGLE)
    env = hub.env(tmp_path)
    ask(env, fetch, "me/moe", "a")
    hub.shutdown()
    hub.server_close()
    fix = "Check network, proxy and HF_ENDPOINT; HF_HUB_OFFLINE=1 uses the local cache only."
    for model in ("me/moe", "me/never-seen"):
        what = f"{model}: the connection to the Hub failed ([Errno 111] Connection refused)"
        assert fails(env, plan, model) == f"HubError: {what}\n    {fix}"
    assert ask({**env, "HF_HUB_OFFLINE": "1"}, plan, "me/moe")["specs"] == SPECS


@pytest.mark.parametrize("token", ["hf_wrongToken", "hf_wrong\x01Token"])
def test_a_token_that_is_refused_is_not_shown(hub: HubServer, tmp_path: Path, token: str) -> None:
    hub.add("me/moe", SINGLE)
    text = fails(hub.env(tmp_path, token=token), plan, "me/moe")
    assert text.startswith("HubError: me/moe: ")
    assert "hf_wrong" not in text
    if token.isprintable():
        assert "Invalid credentials" in text
        assert "Log in with `hf auth login`, or correct HF_TOKEN." in text


def test_importing_does_not_import_the_client(hub: HubServer, tmp_path: Path) -> None:
    code = "import sys, moeforge.sources.hub, moeforge.output.push\n"
    code += "sys.exit('huggingface_hub' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# Pushing


def write(folder: Path, files: dict[str, bytes]) -> str:
    folder.mkdir(exist_ok=True)
    for path, data in files.items():
        (folder / path).write_bytes(data)
    return str(folder)


def test_push_makes_a_repository_of_the_folder(hub: HubServer, tmp_path: Path) -> None:
    out = write(tmp_path / "out", SHARDED)
    env = hub.env(tmp_path / "home", token=hub.token)
    assert ask(env, send, out, "me/new") == f"{hub.url}/me/new"
    files = hub.files("me/new")
    assert files.pop(".gitattributes")
    assert files == SHARDED
    assert not hub.repos["me/new"].private
    assert ask(env, fetch, "me/new", "d") == {"d": tensor(SHARDED[TWO], 1).hex()}
    hub.requests.clear()
    assert ask(env, send, out, "new") == f"{hub.url}/me/new"
    assert not hub.asked("PUT|/commit/")


def test_push_to_a_branch_leaves_main_alone(hub: HubServer, tmp_path: Path) -> None:
    hub.add("me/moe", {"README.md": b"before"})
    out = write(tmp_path / "out", SINGLE)
    env = hub.env(tmp_path / "home", token=hub.token)
    url = ask(env, send, out, "me/moe", revision="v2", message="second try")
    assert url == f"{hub.url}/me/moe/tree/v2"
    assert hub.files("me/moe", "v2") == SINGLE
    assert hub.files("me/moe") == {"README.md": b"before"}
    assert hub.repos["me/moe"].messages[-1] == "second try"
    assert ask(env, send, out, "me/moe", revision="v2") == url


def test_push_removes_weights_of_an_earlier_push(hub: HubServer, tmp_path: Path) -> None:
    kept = {"notes.md": b"", "adapter/adapter_model.safetensors": b"x"}
    hub.add("me/moe", {**SINGLE, "model-00003-of-00003.safetensors": b"x", **kept})
    out = write(tmp_path / "out", SHARDED)
    ask(hub.env(tmp_path / "home", token=hub.token), send, out, "me/moe")
    assert hub.files("me/moe") == {**SHARDED, **kept}
    assert len(hub.repos["me/moe"].commits) == 2


def test_push_private(hub: HubServer, tmp_path: Path) -> None:
    hub.add("me/public", {"README.md": b"before"})
    out = write(tmp_path / "out", SINGLE)
    env = hub.env(tmp_path / "home", token=hub.token)
    ask(env, send, out, "me/private", private=True)
    assert hub.repos["me/private"].private
    assert ask(env, send, out, "me/private", private=True)
    text = fails(env, send, out, "me/public", private=True)
    assert text.startswith(
        "HubError: me/public exists and is public, not private; nothing was sent"
    )
    assert f"{hub.url}/me/public/settings" in text
    assert hub.files("me/public") == {"README.md": b"before"}


def test_push_refuses_an_incomplete_folder(hub: HubServer, tmp_path: Path) -> None:
    def without(name: str) -> dict[str, bytes]:
        return {path: data for path, data in SHARDED.items() if path != name}

    cases = {
        "config": (without("config.json"), "has no config.json"),
        "card": (without("README.md"), "has no README.md, which is the model card"),
        "shard": (without(TWO), f"{TWO} is not a readable safetensors file"),
        "index": (without("model.safetensors.index.json"), "has no model.safetensors and no"),
        "short": ({**SHARDED, TWO: SHARDED[TWO][:-5]}, "was not downloaded whole"),
        "nothing": ({}, "has no config.json"),
    }
    calls = [[[write(tmp_path / k, files), "me/new"], {}] for k, (files, _) in cases.items()]
    calls.append([[str(tmp_path / "nowhere"), "me/new"], {}])
    expected = [part for _, part in cases.values()] + ["has no config.json"]
    results = ask_many(hub.env(tmp_path / "home", token=hub.token), send, calls)
    for (kind, text), part in zip(results, expected, strict=True):
        assert kind == "SourceError"
        assert part in text
    assert not hub.requests


def test_push_failures_say_what_to_do(hub: HubServer, tmp_path: Path) -> None:
    out = write(tmp_path / "out", SINGLE)
    hub.fail("POST /api/models/me/busy/commit", 409, "another commit is in progress")
    hub.fail("POST /api/models/me/down/commit", 502)
    hub.fail("POST /api/models/me/limited/preupload", 429, "too many requests")
    hub.fail("POST /me/refused.git/info/lfs", 403, "storage limit reached")
    hub.fail("POST /api/models/me/dropped/commit", 0)
    hub.fail("POST /api/models/me/sealed/branch", 403, "protected")
    cases: dict[str, list[str]] = {
        "other/moe": ["403: You don't have the rights for the namespace other", "/settings/tokens"],
        "me/busy": ["409: another commit is in progress", "look at it"],
        "me/down": ["the Hub answered 502\n", "Try again later"],
        "me/limited": ["429: too many requests", "Wait some minutes"],
        "me/refused": ["403: storage limit reached", "/settings/tokens"],
        "me/dropped": ["the connection to the Hub failed (RemoteProtocolError)", "network"],
        "me/sealed": ["403: protected"],
        "me/a--b": ["a--b", "Correct what it names"],
    }
    calls = [[[out, repo], {"revision": "v2"} if "sealed" in repo else {}] for repo in cases]
    results = ask_many(hub.env(tmp_path / "home", token=hub.token), send, calls)
    for (kind, text), (repo, parts) in zip(results, cases.items(), strict=True):
        assert kind == "HubError"
        assert text.startswith(f"pushing to {repo}: ")
        assert all(part in text for part in parts), text
        assert hub.token not in text


def test_push_of_a_broken_upload_and_card(hub: HubServer, tmp_path: Path) -> None:
    out = write(tmp_path / "out", SINGLE)
    env = hub.env(tmp_path / "home", token=hub.token)
    hub.fail("PUT /lfs/", 0)
    text = fails(env, send, out, "me/moe")
    assert text.startswith("HubError: pushing to me/moe: the connection to the Hub failed (")
    hub.faults.clear()
    hub.fail("POST /api/validate-yaml", 400, '"license" must be one of apache-2.0, mit')
    text = fails(env, send, out, "me/moe")
    assert '400: "license" must be one of apache-2.0, mit' in text
    assert "Correct what it names" in text
    assert list(hub.files("me/moe")) == [".gitattributes"]


def test_push_without_login_or_connection(hub: HubServer, tmp_path: Path) -> None:
    out = write(tmp_path / "out", SINGLE)
    text = fails(hub.env(tmp_path / "home"), send, out, "me/moe")
    assert text.startswith("HubError: pushing to me/moe: the Hub answered 401")
    assert "`hf auth login`" in text
    text = fails(hub.env(tmp_path / "home", HF_HUB_OFFLINE="1"), send, out, "me/moe")
    assert "offline mode is on\n    Unset HF_HUB_OFFLINE." in text
    assert not hub.repos
    hub.shutdown()
    hub.server_close()
    text = fails(hub.env(tmp_path / "home", token=hub.token), send, out, "me/moe")
    assert "the connection to the Hub failed ([Errno 111] Connection refused)" in text

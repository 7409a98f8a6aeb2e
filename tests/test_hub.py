"""The real huggingface_hub client, in processes of its own, against a Hub in miniature.

Started as a script, this file is such a process, see hub_clients.py.
"""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_clients import INDEX, ONE, SHARDED, SINGLE, SMALL, TWO, Client, pack, serve, write
from hub_server import HubServer

WEIGHTS = r"GET .*(safetensors|\.bin|\.gguf)$"
SPECS = {name: ["bfloat16", [64, 320]] for name in "abcd"}


def header_bytes(file: bytes) -> int:
    return 8 + int.from_bytes(file[:8], "little")


def tensor(file: bytes, index: int) -> bytes:
    start = header_bytes(file) + index * 40960
    return file[start : start + 40960]


CLUTTER = {
    "consolidated.safetensors": pack("abcd", 3),
    "pytorch_model.bin": b"pickle",
    "original/params.json": b"{}",
    "original/config.json": b'{"model_type": "other"}',
    "onnx/model.safetensors": pack("z"),
}


# What the client's process can be asked for.


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
        out = bytearray(source.specs()[name].nbytes - 10)
        source.read(name, 10, memoryview(out))
        assert on_disk[10:] == out
        found[name] = on_disk.hex()
    return found


def send(folder: str, repo_id: str) -> None:
    from moeforge.publishing import push

    push(folder, repo_id, verify=False)


def read_while_the_branch_moves(model: str) -> Any:
    from huggingface_hub import HfApi

    from moeforge.sources import open_source

    source = open_source(model)
    HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=model)
    HfApi().delete_file(TWO, model)
    out = bytearray(source.specs()["d"].nbytes)
    source.read("d", 0, memoryview(out))
    return [source.commit, out.hex()]


def fill_like_another_program(model: str) -> None:
    from huggingface_hub import hf_hub_download, snapshot_download

    snapshot_download(model, allow_patterns=["config.json"])
    hf_hub_download(model, "model.safetensors")


@pytest.fixture
def offline(start: Callable[..., Client]) -> Client:
    return start(HF_HUB_OFFLINE="1")


# Reading


def test_planning_fetches_small_files_and_headers_only(hub: HubServer, stranger: Client) -> None:
    commit = hub.add("me/moe", {**SHARDED, **CLUTTER})
    found = stranger.ask(plan, "me/moe")
    assert found["config"] == {"model_type": "llama"}
    assert found["specs"] == SPECS
    assert found["commit"] == commit
    assert found["files"] == sorted([*SMALL, "model.safetensors.index.json"])
    assert hub.sent(WEIGHTS) == header_bytes(SHARDED[ONE]) + header_bytes(SHARDED[TWO])
    assert not hub.asked("consolidated|original|onnx|bin$")


def test_weights_come_with_the_first_read_and_only_once(
    hub: HubServer, stranger: Client, home: Path
) -> None:
    hub.add("me/moe", {**SHARDED, **CLUTTER})
    expected = {"a": tensor(SHARDED[ONE], 0).hex(), "d": tensor(SHARDED[TWO], 1).hex()}
    assert stranger.ask(fetch, "me/moe", "ad") == expected
    headers = header_bytes(SHARDED[ONE]) + header_bytes(SHARDED[TWO])
    assert hub.sent(WEIGHTS) == len(SHARDED[ONE]) + len(SHARDED[TWO]) + headers
    assert not hub.asked("consolidated|original|onnx|bin$")
    hub.requests.clear()
    another = Client(hub.env(home), __file__)
    assert another.ask(fetch, "me/moe", "ad") == expected
    assert another.ask(plan, "me/moe")["specs"] == SPECS
    another.close()
    assert not hub.asked("/resolve/|/cdn/")


def test_a_single_file_is_preferred_to_shards(hub: HubServer, stranger: Client) -> None:
    hub.add("me/both", {**SHARDED, **SINGLE})
    found = stranger.ask(fetch, "me/both", "c")
    assert found == {"c": tensor(SINGLE["model.safetensors"], 2).hex()}
    assert not hub.asked(r"/model-0000\d")


def test_subfolder(hub: HubServer, stranger: Client) -> None:
    inner = {f"deep/er/{path}": data for path, data in SHARDED.items()}
    hub.add("me/nested", {**inner, **SINGLE, "deep/er/still/config.json": b"{}"})
    found = stranger.ask(plan, "me/nested", subfolder="deep/er")
    assert found["specs"] == SPECS
    assert found["files"] == sorted([*SMALL, "model.safetensors.index.json"])
    found = stranger.ask(fetch, "me/nested", "b", subfolder="./deep/er/")
    assert found == {"b": tensor(SHARDED[ONE], 1).hex()}
    assert not hub.asked("[^r]/config.json|still|/model.safetensors$")


def test_branch_and_commit_can_be_named(hub: HubServer, stranger: Client) -> None:
    old = hub.add("me/moving", SINGLE)
    hub.add("me/moving", SHARDED, branch="refs/pr/1")
    hub.add("me/moving", {**SMALL, "model.safetensors": pack("abcd", 9)})
    found = stranger.ask(fetch, "me/moving", "a", revision=old)
    assert found == {"a": tensor(SINGLE["model.safetensors"], 0).hex()}
    found = stranger.ask(fetch, "me/moving", "a", revision="refs/pr/1")
    assert found == {"a": tensor(SHARDED[ONE], 0).hex()}


def test_the_revision_is_resolved_once(hub: HubServer, member: Client) -> None:
    old = hub.add("me/moving", SHARDED)
    found = member.ask(read_while_the_branch_moves, "me/moving")
    assert found == [old, tensor(SHARDED[TWO], 1).hex()]
    assert TWO not in hub.files("me/moving")
    assert len(hub.asked("GET /api/models/me/moving(/revision/main)?$")) == 1


def test_offline_from_the_cache(hub: HubServer, stranger: Client, offline: Client) -> None:
    commit = hub.add("me/moe", SHARDED)
    stranger.ask(fetch, "me/moe", "ac")
    hub.requests.clear()
    expected = {"c": tensor(SHARDED[TWO], 0).hex()}
    assert offline.ask(fetch, "me/moe", "c") == expected
    assert stranger.ask(fetch, "me/moe", "c", offline=True) == expected
    assert offline.ask(fetch, "me/moe", "c", revision=commit) == expected
    assert not hub.requests


def test_offline_with_the_cache_of_another_program(hub: HubServer, stranger: Client) -> None:
    hub.add("me/moe", {**SINGLE, **CLUTTER})
    stranger.ask(fill_like_another_program, "me/moe")
    assert stranger.ask(plan, "me/moe", offline=True)["specs"] == SPECS


def test_offline_without_the_files(hub: HubServer, stranger: Client, offline: Client) -> None:
    hub.add("me/single", SINGLE)
    hub.add("me/sharded", SHARDED)
    text = "HubError: me/single: offline mode is on, and it is not in the cache\n"
    text += "    Go online once, or fetch it with `hf download`."
    assert stranger.fails(plan, "me/single", offline=True) == text
    assert offline.fails(plan, "me/single") == text
    stranger.ask(plan, "me/single")
    stranger.ask(plan, "me/sharded")
    hub.requests.clear()
    text = "HubError: me/single: offline mode is on, and model.safetensors is not in the cache\n"
    text += "    Go online once, or fetch it with `hf download me/single`."
    assert offline.fails(plan, "me/single") == text
    assert f"HubError: me/sharded: offline mode is on, and {ONE}" in offline.fails(
        plan, "me/sharded"
    )
    assert not hub.requests


def pickle_of(names: str) -> bytes:
    """Return a file of PyTorch's own with the tensors of `pack(names)`."""
    import torch

    file, packed = io.BytesIO(), bytearray(pack(names))
    data = torch.frombuffer(packed, dtype=torch.bfloat16, offset=header_bytes(packed))
    torch.save({name: data.view(-1, 64, 320)[i].clone() for i, name in enumerate(names)}, file)
    return file.getvalue()


def test_pickled_weights_are_downloaded_to_be_planned(hub: HubServer, stranger: Client) -> None:
    weights = pickle_of("abcd")
    hub.add("me/old", {**SMALL, "pytorch_model.bin": weights})
    assert stranger.ask(plan, "me/old")["specs"] == SPECS
    assert hub.sent(WEIGHTS) == len(weights)
    wanted = {name: tensor(pack("abcd"), i).hex() for i, name in enumerate("abcd")}
    assert stranger.ask(fetch, "me/old", "abcd") == wanted
    assert hub.sent(WEIGHTS) == len(weights)


def test_modules_and_code_come_with_the_small_files(hub: HubServer, stranger: Client) -> None:
    modules = b'[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "3_Normalize"}]'
    more = {"1_Pooling/config.json": b"{}", "2_Dense/model.safetensors": pack("w"), "own.py": b"x"}
    hub.add("me/encoder", {**SINGLE, **CLUTTER, **more, "modules.json": modules})
    files = stranger.ask(plan, "me/encoder")["files"]
    assert files == sorted([*SMALL, "modules.json", "1_Pooling", "2_Dense", "own.py"])


def test_a_server_without_ranges_is_hung_up_on(hub: HubServer, stranger: Client) -> None:
    hub.ranges = False
    hub.add("me/moe", SHARDED)
    assert stranger.ask(plan, "me/moe")["specs"] == SPECS


def test_the_token_opens_private_models_and_stays_on_the_hub(
    hub: HubServer, member: Client
) -> None:
    hub.add("me/secret", SHARDED, private=True)
    assert member.ask(plan, "me/secret")["specs"] == SPECS
    assert member.ask(fetch, "me/secret", "a") == {"a": tensor(SHARDED[ONE], 0).hex()}
    assert {r.token for r in hub.asked("/cdn/")} == {""}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every way in which opening and planning fails, as {name: "type: text"}."""
    lying = bytearray(SINGLE["model.safetensors"])
    lying[:8] = (1 << 40).to_bytes(8, "little")
    overlap = SINGLE["model.safetensors"].replace(b"40960, 81920", b"40961, 81921")
    lost = INDEX.replace(b'"d"', b'"e"')
    with HubServer() as hub:
        hub.add("me/private", SINGLE, private=True)
        hub.add("me/gated", SINGLE, gated=True)
        hub.add("me/lora", {"adapter_config.json": b"{}", "adapter_model.safetensors": b""})
        hub.add("me/gguf", {"README.md": b"", "q4.gguf": b"GGUF"})
        hub.add("me/pickle", {**SMALL, "pytorch_model.bin": b"pickle"})
        hub.add("me/empty", {**SMALL, "model.safetensors": b""})
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
        hub.add("me/good", SINGLE)
        names = [name.partition("/")[2] for name in hub.repos if name != "me/good"]
        own = Client(hub.env(tmp_path_factory.mktemp("refused")), __file__)
        found = {name: own.fails(plan, f"me/{name}") for name in [*names, "nowhere", "a--b"]}
        for what, value in (
            ("revision", "v2"),
            ("revision", "0" * 40),
            ("subfolder", "deep"),
            ("subfolder", "../.."),
        ):
            found[value] = own.fails(plan, "me/good", **{what: value})
        own.close()
        # PyTorch's own files have no header to ask for: they are downloaded whole.
        assert [r.path for r in hub.asked(WEIGHTS) if r.sent and not r.range][1:] == []
        assert hub.sent(r"GET .*pytorch_model\.bin$") == len(b"pickle")
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nowhere", ["HubError: me/nowhere: there is no such repository", "hf auth login"]),
        ("private", ["HubError: me/private: there is no such repository", "hf auth login"]),
        ("gated", ["HubError: me/gated: access is restricted", "Ask for access on its page"]),
        ("v2", ["HubError: me/good@v2: there is no such revision", "branches and tags"]),
        ("0" * 40, ["HubError: me/good@000", "there is no such revision", "branches and tags"]),
        ("deep", ["HubError: me/good/deep: there is no such file or folder", "its page"]),
        ("../..", ["SourceError: ../.. is not a folder inside me/good", "relative to"]),
        ("a--b", ["HubError: me/a--b: ", "a--b", "Write it as owner/name"]),
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
        ("lora", ["SourceError: me/lora is an adapter, not a model", 'Write "BASE+me/lora"']),
        ("gguf", ["SourceError: me/gguf holds GGUF files", "original checkpoint"]),
        ("pickle", ["SourceError: ", "pytorch_model.bin is not a readable PyTorch checkpoint"]),
        ("empty", ["SourceError: me/empty: model.safetensors is not", "it has 0 in all"]),
        ("short", ["SourceError: me/short: model.safetensors is not", "not downloaded whole"]),
        ("lying", ["SourceError: me/lying: model.safetensors is not", "1099511627776 bytes"]),
        (
            "overlap",
            ["SourceError: me/overlap: model.safetensors is not", "b starts at byte 40961"],
        ),
        ("absent", ["SourceError: me/absent", f"names {TWO}, which the repository lacks"]),
        ("lost", ["SourceError: me/lost: the index lists 1 tensors that no file has, first e"]),
        ("unmapped", ["SourceError: me/unmapped", "has no weight_map"]),
    ],
)
def test_refusals_say_what_and_what_to_do(
    refusals: dict[str, str], name: str, expected: list[str]
) -> None:
    assert refusals[name].startswith(expected[0])
    assert all(part in refusals[name] for part in expected)


def test_a_download_that_breaks(hub: HubServer, stranger: Client) -> None:
    hub.add("me/moe", SINGLE)
    hub.fail("GET /cdn/", 0)
    text = stranger.fails(fetch, "me/moe", "a")
    said = "HubError: me/moe, model.safetensors: the connection to the Hub failed ("
    assert text.startswith(said)
    assert "Check network, proxy and HF_ENDPOINT" in text
    hub.faults.clear()
    assert stranger.ask(fetch, "me/moe", "a") == {"a": tensor(SINGLE["model.safetensors"], 0).hex()}


def test_no_connection(tmp_path: Path) -> None:
    with HubServer() as hub:
        hub.add("me/moe", SINGLE)
        own = Client(hub.env(tmp_path), __file__)
        own.ask(fetch, "me/moe", "a")
        own.close()
    own = Client(hub.env(tmp_path, token=hub.token), __file__)
    said = "the connection to the Hub failed ([Errno 111] Connection refused)\n"
    said += "    Check network, proxy and HF_ENDPOINT; HF_HUB_OFFLINE=1 uses the local cache only."
    for model in ("me/moe", "me/never-seen"):
        assert own.fails(plan, model) == f"HubError: {model}: {said}"
    text = own.fails(plan, "nowhere")
    assert text.startswith("HubError: nowhere: the connection to the Hub failed")
    assert "; and no folder nowhere is here" in text
    assert own.ask(plan, "me/moe", offline=True)["specs"] == SPECS
    out = write(tmp_path / "out", SINGLE)
    assert own.fails(send, out, "me/new") == f"HubError: pushing to me/new: {said}"
    own.close()


@pytest.mark.parametrize("token", ["hf_wrongToken", "hf_wrong\x0cToken"])
def test_a_token_that_is_refused_is_not_shown(
    hub: HubServer, start: Callable[..., Client], token: str
) -> None:
    hub.add("me/moe", SINGLE)
    text = start(token=token).fails(plan, "me/moe")
    assert text.startswith("HubError: me/moe: ")
    assert "hf_wrong" not in text
    if token.isprintable():
        assert "Invalid credentials" in text
        assert "Log in with `hf auth login`, or correct HF_TOKEN." in text


def test_importing_does_not_import_the_client() -> None:
    code = "import sys, moeforge.sources.hub, moeforge.output.push\n"
    code += "sys.exit('huggingface_hub' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True)


if __name__ == "__main__":
    serve(globals())

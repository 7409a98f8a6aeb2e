"""What is sent to a Hub in miniature by the real client, and what becomes of it when it breaks.

Started as a script, this file is a process with huggingface_hub in it, see hub_clients.py.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from documented import hold
from hub_clients import INDEX, ONE, SHARDED, SINGLE, TWO, Client, pack, serve, write
from hub_server import HubServer

INDEX_FILE = "model.safetensors.index.json"


def lock_of(files: dict[str, bytes], before: bool = False) -> bytes:
    """Return a lock file that lists `files` as what was built, or one of the format before."""
    key, digest = ("sha256", hashlib.sha256) if before else ("blake3", blake3)
    outputs = {
        name: {"size": len(data), key: digest(data).hexdigest()}
        for name, data in files.items()
        if name != "README.md"
    }
    rest = {key: {} for key in ("versions", "recipe", "settings", "inputs", "files")}
    return json.dumps(
        {"lock": 1 if before else 2, "name": "moe", **rest, "outputs": outputs}
    ).encode()


# What the client's process can be asked for.


def send(folder: str, repo_id: str, **options: Any) -> str:
    from moeforge.publishing import push

    return push(folder, repo_id, verify=False, **options).url


def ask_whether_it_passes(folder: str, repo_id: str) -> Any:
    from moeforge.publishing import prepared

    return prepared(folder, repo_id).as_data()


def run(*arguments: str) -> Any:
    """Run a command of the command line; return exit code, standard output, standard error."""
    import transformers  # noqa: F401  # so that checks need no process of their own
    from typer.testing import CliRunner

    from moeforge.cli import app

    done = CliRunner().invoke(app, list(arguments))
    return [done.exit_code, done.stdout, done.stderr]


@pytest.fixture
def with_xet(start: Callable[..., Client], tmp_path_factory: pytest.TempPathFactory) -> Client:
    """The client that sends by Xet where the server has it, and has its token in a file."""
    token = tmp_path_factory.getbasetemp() / "token"
    token.write_text(HubServer.token)
    unasked = {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    return start(HF_TOKEN_PATH=str(token), HF_HUB_DISABLE_XET="0", **unasked)


# What arrives


@pytest.mark.parametrize("part", [None, 30_000])
def test_push_makes_a_repository_of_the_folder(
    hub: HubServer, member: Client, tmp_path: Path, part: int | None
) -> None:
    hub.part = part
    hub.fail("/whoami", 429, "asked too often")  # which does not say that it may not be made
    locked = lock_of(SHARDED, before=part is not None)
    sent = {**SHARDED, "moeforge.lock.json": locked}
    out = write(tmp_path, {**sent, ".env": b"SECRET=1"})
    assert member.ask(send, out, "me/new") == f"{hub.url}/me/new"
    files = hub.files("me/new")
    assert files.pop(".gitattributes")
    assert files == sent
    assert not hub.repos["me/new"].private
    assert len(hub.asked("PUT /lfs/")) == (2 if part is None else 6)
    assert len(hub.asked("/commit/")) == 1
    hub.requests.clear()
    hub.faults.clear()
    assert member.ask(send, out, "new") == f"{hub.url}/me/new"
    assert not hub.asked("PUT|/commit/|/create")


def test_push_to_a_branch_leaves_main_alone(hub: HubServer, member: Client, tmp_path: Path) -> None:
    hub.add("me/moe", {"README.md": b"before"})
    out = write(tmp_path, SINGLE)
    url = member.ask(send, out, "me/moe", revision="v2", message="second try")
    assert url == f"{hub.url}/me/moe/tree/v2"
    assert hub.files("me/moe", "v2") == SINGLE
    assert hub.files("me/moe") == {"README.md": b"before"}
    assert hub.repos["me/moe"].messages[-1] == "second try"
    assert member.ask(send, out, "me/moe", revision="v2") == url


def test_push_removes_what_would_be_wrong_of_this_model(
    hub: HubServer, member: Client, tmp_path: Path
) -> None:
    kept = {"notes.md": b"", "adapter/adapter_model.safetensors": b"x", "adapter/moeforge.yml": b""}
    old = {"model-00003-of-00003.safetensors": b"x", "moeforge.lock.json": b"{}"}
    hub.add("me/moe", {**SINGLE, **old, **kept})
    member.ask(send, write(tmp_path, SHARDED), "me/moe")
    assert hub.files("me/moe") == {**SHARDED, **kept}
    assert len(hub.repos["me/moe"].commits) == 2


def test_push_private(hub: HubServer, member: Client, tmp_path: Path) -> None:
    hub.add("me/public", {"README.md": b"before"})
    out = write(tmp_path, SINGLE)
    member.ask(send, out, "me/private", private=True)
    assert hub.repos["me/private"].private
    member.ask(send, out, "me/private", private=True)
    text = member.fails(send, out, "me/public", private=True)
    assert text.startswith(
        "HubError: me/public exists and is public, not private; nothing was sent"
    )
    assert f"{hub.url}/me/public/settings" in text
    assert hub.files("me/public") == {"README.md": b"before"}


def test_push_as_a_pull_request(
    hub: HubServer, member: Client, start: Callable[..., Client], tmp_path: Path
) -> None:
    out = write(tmp_path, SINGLE)
    text = member.fails(send, out, "other/moe", pr=True)
    assert text.startswith("HubError: pushing to other/moe: there is no repository to open a pull")
    before = {"README.md": b"before", "model-00001-of-00001.safetensors": b"x"}
    hub.add("other/moe", before)
    assert "403: You don't have the rights" in member.fails(send, out, "other/moe")
    assert not hub.asked("POST|PUT")  # it was known before anything was sent
    url = start(token=hub.reader).ask(send, out, "other/moe", pr=True)
    assert url == f"{hub.url}/other/moe/discussions/1"
    assert hub.files("other/moe", "refs/pr/1") == SINGLE
    assert hub.files("other/moe") == before


def test_push_by_xet(hub: HubServer, with_xet: Client, tmp_path: Path) -> None:
    out, hub.storage = write(tmp_path / "out", SHARDED), tmp_path / "storage"
    hub.fail("/commit/", 403, "not now")
    assert "403: not now" in with_xet.fails(send, out, "me/new")
    stored = {path: path.stat().st_size for path in hub.storage.rglob("default.*")}
    assert sum(stored.values()) > len(SHARDED[ONE]) + len(SHARDED[TWO])
    hub.faults.clear()
    with_xet.ask(send, out, "me/new")
    assert {path: path.stat().st_size for path in hub.storage.rglob("default.*")} == stored
    assert not hub.asked("PUT|info/lfs")
    files = hub.files("me/new")
    assert files.pop(".gitattributes")
    assert files == SHARDED


def test_a_server_without_xet_gets_lfs(hub: HubServer, with_xet: Client, tmp_path: Path) -> None:
    with_xet.ask(send, write(tmp_path, SHARDED), "me/new")
    assert hub.received("PUT /lfs/") == len(SHARDED[ONE]) + len(SHARDED[TWO])
    assert {**hub.files("me/new"), **SHARDED} == hub.files("me/new")


# What breaks


def test_a_connection_that_breaks_in_the_middle_of_a_file(
    hub: HubServer, member: Client, tmp_path: Path
) -> None:
    out = write(tmp_path, SHARDED)
    second = hashlib.sha256(SHARDED[TWO]).hexdigest()
    hub.cut(f"PUT /lfs/{second}", 50_000)
    text = member.fails(send, out, "me/new")
    assert text.startswith("HubError: pushing to me/new: the connection to the Hub failed (")
    assert list(hub.files("me/new")) == [".gitattributes"]
    tries = hub.asked(f"PUT /lfs/{second}")
    assert {request.received for request in tries} == {50_000}
    assert len(tries) == 6  # the client itself gives up in the end
    hub.cuts.clear()
    hub.requests.clear()
    member.ask(send, out, "me/new")
    assert hub.received("PUT") == len(SHARDED[TWO])
    assert {**hub.files("me/new"), **SHARDED} == hub.files("me/new")
    assert len(hub.repos["me/new"].commits) == 2


def test_a_branch_that_moves_is_looked_at_again(
    hub: HubServer, member: Client, tmp_path: Path
) -> None:
    before = hub.add("me/moe", SINGLE)

    def move() -> None:
        if hub.repos["me/moe"].branches["main"] == before:
            hub.add("me/moe", {**SINGLE, "model-00007-of-00007.safetensors": b"x", "new.md": b""})

    hub.hold("/commit/", move)
    member.ask(send, write(tmp_path, SHARDED), "me/moe")
    assert hub.files("me/moe") == {**SHARDED, "new.md": b""}
    assert [request.status for request in hub.asked("/commit/")] == [412, 200]
    assert len(hub.asked("PUT /lfs/")) == 2


def test_a_commit_whose_answer_is_lost_is_not_made_twice(
    hub: HubServer, member: Client, tmp_path: Path
) -> None:
    out = write(tmp_path, SINGLE)
    hub.lose("/commit/")
    member.ask(send, out, "me/new")
    assert hub.repos["me/new"].messages == ["", "Upload with moeforge"]
    hub.add("you/moe", {})
    hub.lose("/commit/")
    text = member.fails(send, out, "you/moe", pr=True)
    assert f"whether it was made after all: {hub.url}/you/moe/discussions" in text
    assert list(hub.repos["you/moe"].branches) == ["main", "refs/pr/1"]


@pytest.mark.parametrize(
    ("repo", "fault", "expected"),
    [
        ("other/moe", (), ["no such repository, and you cannot make one of other", "/tokens"]),
        ("me/a--b", (), ["a--b", "Write it as owner/name"]),
        ("me/moe", ("/whoami", 401, "expired"), ["the Hub answered 401\n", "`hf auth login`"]),
        ("me/moe", ("/create", 404, "no such owner"), ["404: no such owner", "Check the name"]),
        ("me/moe", ("/commit/", 409, "one is in progress"), ["409: one is in progress", "look at"]),
        ("me/moe", ("/commit/", 413, "big"), ["413: big", "--shard-size"]),
        ("me/moe", ("/commit/", 422, "odd"), ["422: odd", "Correct what"]),
        ("me/moe", ("/commit/", 502), ["the Hub answered 502\n", "Try again later"]),
        ("me/moe", ("/preupload/", 429, "too many"), ["429: too many", "Wait some minutes"]),
        ("me/moe", ("/info/lfs/", 403, "no storage left"), ["403: no storage left", "/tokens"]),
        ("me/moe", ("/branch/", 403, "protected"), ["403: protected", "/tokens"]),
        (
            "me/moe",
            ("/validate-yaml", 400, '"license" is odd'),
            ['400: "license" is odd', "Correct"],
        ),
        (
            "me/moe",
            ("/commit/", 0),
            ["the connection to the Hub failed (RemoteProtocol", "network"],
        ),
    ],
)
def test_push_failures_say_what_to_do(
    hub: HubServer,
    member: Client,
    tmp_path: Path,
    repo: str,
    fault: tuple[Any, ...],
    expected: list[str],
) -> None:
    if fault:
        hub.fail(*fault)
    text = member.fails(send, write(tmp_path, SINGLE), repo, revision="v2")
    assert text.startswith(f"HubError: pushing to {repo}: ")
    assert [part for part in expected if part not in text] == []
    assert hub.token not in text
    assert all(list(hub.files(repo)) == [".gitattributes"] for repo in hub.repos)


def test_push_without_a_token_that_may_write(
    hub: HubServer, stranger: Client, start: Callable[..., Client], tmp_path: Path
) -> None:
    out = write(tmp_path, SINGLE)
    text = stranger.fails(send, out, "me/moe")
    assert text.startswith("HubError: pushing to me/moe: there is no token\n    Log in with `hf au")
    assert not hub.requests
    text = start(HF_HUB_OFFLINE="1").fails(send, out, "me/moe")
    assert text.endswith("offline mode is on\n    Unset HF_HUB_OFFLINE.")
    reader = start(token=hub.reader)
    assert "me/moe: your token may only read\n" in reader.fails(send, out, "me/moe")
    hub.add("me/moe", {"README.md": b""})
    assert "the Hub answered 403: this token may not write" in reader.fails(send, out, "me/moe")
    text = start(token="hf_wrong").fails(send, out, "me/moe")
    assert "401: Invalid credentials" in text
    assert "hf_wrong" not in text
    assert hub.files("me/moe") == {"README.md": b""}
    assert list(hub.repos) == ["me/moe"]


# What is refused


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config.json": None}, "has no config.json"),
        ({"README.md": None}, "has no README.md, which is the model card on the Hub"),
        ({TWO: None}, f"{TWO} is not a readable safetensors file"),
        ({TWO: SHARDED[TWO][:-5]}, "was not downloaded whole"),
        ({INDEX_FILE: None}, "has none of model.safetensors, model"),
        (dict.fromkeys(SHARDED), "has no config.json"),
    ],
)
def test_push_refuses_an_incomplete_folder(
    hub: HubServer, member: Client, tmp_path: Path, files: dict[str, bytes | None], expected: str
) -> None:
    left = {path: data for path, data in {**SHARDED, **files}.items() if data is not None}
    assert "nowhere does not exist" in member.fails(send, str(tmp_path / "nowhere"), "me/new")
    text = member.fails(send, write(tmp_path, left), "me/new")
    assert text.startswith("SourceError: ")
    assert expected in text
    assert not hub.requests


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({TWO: pack("cd", 5)}, f"{TWO} is not what was built: its BLAKE3 is "),
        (
            {TWO: pack("cd", 5), "moeforge.lock.json": lock_of(SHARDED, before=True)},
            f"{TWO} is not what was built: its SHA-256 is ",
        ),
        ({"config.json": b'{"model_type": "llama" }'}, "config.json has 24 bytes, moeforge.lock"),
        ({"tokenizer.json": None}, "tokenizer.json is in moeforge.lock.json, and is not here"),
    ],
)
def test_push_refuses_what_is_not_what_was_built(
    hub: HubServer, member: Client, tmp_path: Path, files: dict[str, bytes | None], expected: str
) -> None:
    changed = {**SHARDED, "moeforge.lock.json": lock_of(SHARDED), **files}
    left = {path: data for path, data in changed.items() if data is not None}
    text = member.fails(send, write(tmp_path, left), "me/new")
    assert text.startswith("SourceError: ")
    assert expected in text
    assert "is not what moeforge.lock.json says; nothing was sent" in text
    assert not hub.repos


def test_push_refuses_what_does_not_pass_its_checks(
    hub: HubServer, member: Client, tmp_path: Path
) -> None:
    index = {**json.loads(INDEX), "metadata": {"total_size": 5}}
    out = write(tmp_path, {**SHARDED, INDEX_FILE: json.dumps(index).encode()})
    text = member.fails(ask_whether_it_passes, out, "me/new")
    assert text.startswith("SourceError: the index says 5 bytes of tensors, the files have 163840")
    assert f"`moeforge verify {out}` shows all of them" in text
    assert not hub.repos


# The commands


def test_dry_run_says_what_a_push_would_do(
    hub: HubServer, member: Client, stranger: Client, tmp_path: Path
) -> None:
    out = write(tmp_path, SHARDED)
    command = ["push", out, "me/new", "--no-verify", "--dry-run"]
    code, text, warning = stranger.ask(run, *command)
    assert code == 0
    assert re.search(rf"^{TWO} +82.1 kB +sent *$", text, re.MULTILINE)
    words = " ".join(text.split())
    assert "9 files, 164 kB, would go to the branch main of me/new. The repository would" in words
    assert "warning: there is no token" in warning
    hub.add("me/new", {ONE: SHARDED[ONE], "LICENSE": b"MIT", TWO: b"old", "model.safetensors": b""})
    code, text, warning = member.ask(run, *command, "--json", "--private")
    assert code == 6
    assert "is public, not private" in json.loads(text)["errors"][0]["what"]
    code, text, warning = member.ask(run, *command, "--json", "--pr")
    found = json.loads(text)
    assert (code, warning) == (0, "")
    assert {file["path"]: file["bytes"] for file in found["unchanged"]} == {
        ONE: len(SHARDED[ONE]),
        "LICENSE": 3,
    }
    assert {file["path"] for file in found["upload"]} == SHARDED.keys() - {ONE, "LICENSE"}
    assert found["bytes"] == sum(map(len, SHARDED.values())) - len(SHARDED[ONE]) - 3
    assert found["remove"] == ["model.safetensors"]
    hold("push", found)
    assert (found["exists"], found["private"], found["revision"]) == (True, False, "main")
    assert not hub.asked("PUT|POST")
    code, text, _ = member.ask(run, *command[:-1], "--json", "--pr", "-m", "words")
    made = json.loads(text)
    hold("push", made)
    assert made["pull_request"] == made["url"] == f"{hub.url}/me/new/discussions/1"
    assert hub.repos["me/new"].branches["refs/pr/1"] == made["commit"]
    assert hub.repos["me/new"].messages[-1] == "words"
    hub.add("me/new", SHARDED)
    _, text, _ = member.ask(run, *command)
    assert text.splitlines()[-1] == "me/new has all of it, on the branch main."
    code, text, told = member.ask(run, *command[:-1])
    assert (code, text) == (0, f"{hub.url}/me/new\n")
    assert "me/new has all of it already: no commit was made" in told


def test_build_and_push(hub: HubServer, member: Client, llamas: Any, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yml", tmp_path / "out"
    models = [{"model": str(llamas[0]), "parameters": {"weight": 1}}]
    recipe.write_text(json.dumps({"merge_method": "linear", "models": models}))
    build = ["build", str(recipe), "-o", str(out), "--push"]
    code, _, text = member.ask(run, *build, "other/moe")
    assert code == 6
    assert "you cannot make one of other" in text
    for more in (["--no-verify"], ["--offline"]):
        assert member.ask(run, *build, "me/moe", *more)[0] == 2
    assert member.ask(run, *build[:-1], "--private")[0] == 2
    assert not out.exists()  # all that was told before the build began
    hub.fail("/commit/", 403, "protected")
    code, _, text = member.ask(run, *build, "me/moe", "--private", "--quiet")
    assert code == 6
    assert "403: protected" in text
    assert f"the model is finished, in {out}" in text
    told = shlex.split(text.partition("to push it: ")[2])
    hub.faults.clear()
    hub.requests.clear()
    code, text, _ = member.ask(run, *told[1:])
    assert (code, text) == (0, f"{hub.url}/me/moe\n")
    assert not hub.asked("PUT")  # the weights came with the first push
    files = hub.files("me/moe")
    assert files.pop(".gitattributes")
    assert files == {path.name: path.read_bytes() for path in out.iterdir()}
    assert hub.repos["me/moe"].private


if __name__ == "__main__":
    serve(globals())

"""The Hub in miniature and the real huggingface_hub client beside it, as fixtures for tests.

huggingface_hub reads its environment when it is imported. So a client is a process of its own: a
test file that is started as a script, which calls functions of that file for the tests.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer

ROOT = Path(__file__).parent.parent


def pack(names: str, seed: int = 0) -> bytes:
    """Return a safetensors file with tensors of 40 kB of noise."""
    header, data = {}, random.Random(seed).randbytes(len(names) * 40960)
    for i, name in enumerate(names):
        offsets = [i * 40960, (i + 1) * 40960]
        header[name] = {"dtype": "BF16", "shape": [64, 320], "data_offsets": offsets}
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


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


def serve(functions: dict[str, Any]) -> None:
    """Answer calls, one per line of standard input, by [error type or "", result or message]."""
    from moeforge.errors import MoeforgeError

    time.sleep = lambda _: None  # between retries huggingface_hub waits for seconds
    for line in sys.stdin:
        name, args, options = json.loads(line)
        try:
            answer = ["", functions[name](*args, **options)]
        except MoeforgeError as error:
            answer = [type(error).__name__, str(error)]
        print(json.dumps(answer), flush=True)


def write(folder: Path, files: dict[str, bytes]) -> str:
    folder.mkdir(exist_ok=True)
    for path, data in files.items():
        (folder / path).write_bytes(data)
    return str(folder)


class Client:
    """A process with huggingface_hub in it, and an environment of its own."""

    def __init__(self, env: dict[str, str], script: str) -> None:
        command = [sys.executable, "-W", "ignore", script]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env={**env, "PYTHONPATH": str(ROOT)}, **pipes)

    def answer(self, function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        self.process.stdin.write(json.dumps([function.__name__, args, options]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline() or "the client crashed, see stderr")

    def ask(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Return the result of a call that must work."""
        error, result = self.answer(function, *args, **options)
        assert not error, result
        return result

    def fails(self, function: Callable[..., Any], *args: Any, **options: Any) -> str:
        """Return `type: message` of the moeforge error that a call must raise."""
        error, message = self.answer(function, *args, **options)
        assert error, message
        return f"{error}: {message}"

    def close(self) -> None:
        self.process.communicate()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(server: HubServer, home: Path) -> HubServer:
    """The server without repositories, and with it an empty cache."""
    server.clear()
    shutil.rmtree(home, ignore_errors=True)
    return server


@pytest.fixture(scope="module")
def start(
    server: HubServer, home: Path, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Client]]:
    """Return the client with given additions to its environment, started once per module."""
    started: dict[str, Client] = {}

    def start(**more: str) -> Client:
        key = json.dumps(more)
        if key not in started:
            started[key] = Client(server.env(home, **more), request.module.__file__)
        return started[key]

    yield start
    for client in started.values():
        client.close()


@pytest.fixture
def stranger(start: Callable[..., Client]) -> Client:
    """The client without a token."""
    return start()


@pytest.fixture
def member(start: Callable[..., Client]) -> Client:
    """The client that is logged in."""
    return start(token=HubServer.token)

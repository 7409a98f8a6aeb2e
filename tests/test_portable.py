"""Systems other than Linux: what only Linux has is asked in one place, and can be done without."""

import ast
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import moeforge
from moeforge import system
from moeforge.output import staging

ROOT = Path(moeforge.__file__).parent
OWNER = ROOT / "system.py"

ABSENT = set(
    """
    copy_file_range fchmod fork forkpty getloadavg getpgid killpg mkfifo nice posix_fadvise
    posix_fallocate pread preadv preadv2 pwrite pwritev pwritev2 register_at_fork
    sched_getaffinity sched_setaffinity setsid splice sync sysconf uname
    O_CLOEXEC O_DIRECT O_DIRECTORY O_NOFOLLOW
    """.split()  # noqa: SIM905
)
"""Names of os that Windows has not, but for what Python's own library cannot do without here."""
OWNED = ABSENT | {
    "statvfs",
    "sendfile",
    "open",
    "posix_fallocate",
    "truncate",
    "st_blocks",
    "pthread_sigmask",
    "platform",
}
"""Attributes that only the owner uses: absent elsewhere, or other there."""
MODULES = {"ctypes", "fcntl", "grp", "msvcrt", "psutil", "pwd", "resource", "select", "termios"}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    models = tiny.Maker(tmp_path_factory.mktemp("models"))
    one, two = (str(models("llama", seed=seed, num_hidden_layers=2)) for seed in (1, 2))
    spans = [{"sources": [{"model": model, "layer_range": [0, 2]}]} for model in (one, two)]
    return {
        "merge": {
            "merge_method": "slerp",
            "base_model": one,
            "models": [{"model": one}, {"model": two}],
            "parameters": {"t": 0.3},
        },
        "stack": {"merge_method": "passthrough", "slices": spans},
        "mixture": {
            "base_model": one,
            "gate_mode": "random",
            "experts": [{"source_model": model} for model in (one, two)],
        },
    }


def hashes(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


CHILD = """
# Windows as far as it can be had here: without what it lacks, and refusing what it refuses.
import importlib, json, os, pkgutil, sys
import accelerate, numba, torch, transformers  # which have editions of their own for Windows

asked = json.loads(sys.argv[1])

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource"):
            raise ModuleNotFoundError(name)

class Msvcrt:  # as Python documents it, with the one lock that this program may meet
    LK_NBLCK, held = 2, {}

    @classmethod
    def locking(cls, descriptor, mode, count):
        inode = os.fstat(descriptor).st_ino
        if inode in cls.held and os.path.samestat(os.fstat(cls.held[inode]), os.fstat(descriptor)):
            raise OSError(13, "Permission denied")
        cls.held[inode] = os.dup(descriptor)

for name in asked["absent"]:
    if hasattr(os, name):
        delattr(os, name)
for name in ("fcntl", "resource"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Refused())
sys.modules["msvcrt"] = Msvcrt

real_open, real_fsync, flags = os.open, os.fsync, {}

def opened(path, how, mode=0o777, **more):
    if not sys._getframe(1).f_globals["__name__"].startswith("moeforge"):
        return real_open(path, how, mode, **more)
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    descriptor = real_open(path, how & ~os.O_BINARY, mode)
    flags[descriptor] = how
    return descriptor

def synced(descriptor):
    how = flags.get(descriptor, os.O_RDWR)
    if not how & (os.O_RDWR | os.O_WRONLY):
        raise OSError(9, "Bad file descriptor")
    return real_fsync(descriptor)

os.open, os.fsync, os.O_BINARY = opened, synced, 0x40000000
before, sys.platform = sys.platform, "win32"
import moeforge.system
sys.platform = before

import moeforge, moeforge.cli
for found in pkgutil.walk_packages(moeforge.__path__, "moeforge."):
    if found.name != "moeforge.__main__":
        importlib.import_module(found.name)
from pathlib import Path
root = Path(asked["root"])
for name, recipe in asked["recipes"].items():
    moeforge.build(recipe, root / name, threads=2, verify=False)
    moeforge.build(recipe, root / name, threads=2, verify=False, overwrite=True)

from moeforge.output.staging import locked
from moeforge.errors import BuildError
refused = False
with locked(root / "busy", overwrite=False):
    try:
        with locked(root / "busy", overwrite=False):
            pass
    except BuildError as error:
        refused = "another build" in str(error)
from moeforge.checking.needs import free_memory
print(json.dumps({
    "forks": moeforge.system.FORKS,
    "cores": moeforge.system.cores(),
    "memory": free_memory(),
    "refused": refused,
    "text": sum(not how & os.O_BINARY for how in flags.values()),
    "left": sorted(item.name for item in root.iterdir()),
}))
"""


@pytest.fixture(scope="module")
def elsewhere(recipes, tmp_path_factory):
    """What a process found that had nothing of Linux: (facts, folder of its builds)."""
    root = tmp_path_factory.mktemp("elsewhere")
    asked = json.dumps({"absent": sorted(ABSENT), "recipes": recipes, "root": str(root)})
    run = subprocess.run(
        [sys.executable, "-c", CHILD, asked], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout), root


def test_builds_need_nothing_of_linux(elsewhere, recipes, tmp_path):
    """Every module is imported, and every kind of build made, twice: the bytes are the same."""
    facts, root = elsewhere
    for name, recipe in recipes.items():
        moeforge.build(recipe, tmp_path / name, threads=2, verify=False)
        assert hashes(root / name) == hashes(tmp_path / name)
        assert hashes(root / name)
    assert facts["left"] == sorted(recipes), "no lock and no work folder"


def test_what_others_say_of_the_machine(elsewhere):
    facts, _ = elsewhere
    assert facts["forks"] is False
    assert facts["cores"] == os.cpu_count()
    assert facts["memory"] == pytest.approx(system.free_memory(), rel=0.5)


def test_locks_hold_and_files_are_opened_as_bytes(elsewhere):
    facts, _ = elsewhere
    assert facts["refused"], "two builds of one output at the same time"
    assert facts["text"] == 0, "a file whose line ends Windows would change"


def test_folders_of_other_spelling_are_the_same(tmp_path, monkeypatch):
    """macOS and Windows tell no small letters from capitals: only the file system knows."""
    (tmp_path / "model" / "inner").mkdir(parents=True)
    (tmp_path / "Model").symlink_to(tmp_path / "model")
    monkeypatch.setattr(Path, "resolve", Path.absolute)
    for folder in (tmp_path / "model", tmp_path / "model" / "inner"):
        with pytest.raises(moeforge.errors.BuildError, match="made from"):
            staging.refuse_inputs(tmp_path / "Model", [folder])
    staging.refuse_inputs(tmp_path / "Model" / "new", [tmp_path / "model"])
    staging.refuse_inputs(tmp_path / "model" / "inner", [tmp_path / "Model"])


FILES = [path for path in ROOT.rglob("*.py") if path != OWNER]


def test_only_one_module_asks_for_what_not_all_systems_have():
    found = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            used = set()
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id in ("os", "signal", "sys", "shutil", "platform"):
                    used = {node.attr} & OWNED
            elif isinstance(node, ast.Attribute):
                used = {node.attr} & {"st_blocks"}
            elif isinstance(node, ast.Import):
                used = {alias.name for alias in node.names} & MODULES
            elif isinstance(node, ast.ImportFrom):
                names = {alias.name for alias in node.names} if node.module == "os" else set()
                used = ({node.module} & MODULES) | (names & OWNED)
            found += [f"{path.relative_to(ROOT)}:{node.lineno} {name}" for name in used]
    assert not found


def test_text_has_an_encoding():
    """Windows would take its own."""
    found = []
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", "")
            name = "open" if getattr(node.func, "id", "") == "open" else name
            given = {keyword.arg for keyword in node.keywords}
            words = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            binary = any(isinstance(word, str) and "b" in word for word in words)
            asks = name in ("read_text", "write_text") or (name == "open" and not binary)
            owner = getattr(getattr(node.func, "value", None), "id", "")
            asks = asks and owner not in ("os", "texts", "heldout")
            asks |= name in ("run", "Popen", "check_output") and bool(given & {"text"})
            if asks and "encoding" not in given:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found

"""Models of the Hub come file by file, while others are merged already."""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm
import yaml
from hub_server import HubServer

import moeforge
from moeforge.errors import MoeforgeError

WEIGHTS = r"/cdn/.*safetensors$"


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def sharded(models):
    """Two llamas in eight files each, or so."""
    return [models("llama", seed=seed, shard_size="100kB") for seed in (1, 2)]


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def weights(folder):
    found = sorted(Path(folder).glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


def put(hub, sharded):
    for name, folder in zip(("one", "two"), sharded, strict=True):
        hub.add(f"me/{name}", files(folder))


def merge(*names):
    models = [{"model": str(name), "parameters": {"weight": w}} for w, name in enumerate(names, 1)]
    return {"merge_method": "linear", "models": models}


def stack(*names):
    slices = [{"sources": [{"model": str(name), "layer_range": [0, 2]}]} for name in names]
    return {"merge_method": "passthrough", "slices": slices}


def mixture(*names):
    experts = [{"source_model": str(name)} for name in names]
    return {"base_model": str(names[0]), "experts": experts, "gate_mode": "random"}


PIPE = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
RECIPES = {"merge": merge, "stack": stack, "mixture": mixture}
NAMES = ("me/one", "me/two")


def build(hub, place, recipe, *options, code=0):
    (place / "recipe.yml").write_text(yaml.safe_dump(recipe))
    words = ["build", "recipe.yml", "-o", "out", "--no-verify", "--shard-size", "100kB", *options]
    done = warm.moeforge(*words, cwd=place, env=hub.env(place / "home"), timeout=60)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def cached(place):
    """Bytes of weights in the cache: files that are whole, and those that are coming."""
    total = 0
    for file in (place / "home").rglob("blobs/*"):
        try:
            total += file.stat().st_size if file.stat().st_size > 20_000 else 0
        except FileNotFoundError:
            continue
    return total


@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("kind", RECIPES)
def test_the_same_bytes_as_from_folders(kind, threads, hub, sharded, tmp_path):
    put(hub, sharded)
    moeforge.build(RECIPES[kind](*sharded), tmp_path / "local", shard_size=100_000, verify=False)
    build(hub, tmp_path, RECIPES[kind](*NAMES), "--threads", threads)
    assert weights(tmp_path / "out") == weights(tmp_path / "local")


def test_only_files_that_the_plan_needs(hub, sharded, tmp_path):
    put(hub, sharded)
    index = json.loads((sharded[0] / "model.safetensors.index.json").read_text())["weight_map"]
    recipe = stack("me/one")
    build(hub, tmp_path, recipe)
    outside = ("embed_tokens", "norm.weight", "lm_head")
    needed = {
        file
        for name, file in index.items()
        if any(f".layers.{n}." in name for n in (0, 1))
        or (".layers." not in name and any(part in name for part in outside))
    }
    asked = {request.path.rpartition("/")[2] for request in hub.asked(WEIGHTS) if not request.range}
    assert asked == needed < set(index.values())


@pytest.mark.parametrize("kind", RECIPES)
def test_work_begins_before_the_last_file_has_come(kind, hub, sharded, tmp_path):
    put(hub, sharded)
    index = json.loads((sharded[0] / "model.safetensors.index.json").read_text())["weight_map"]
    last = index["lm_head.weight"]
    finished = []

    def wait():
        """Hold the last file back until a file of the output is finished."""
        until = time.monotonic() + 20
        while time.monotonic() < until:
            journal = tmp_path / ".out.moeforge" / "journal.json"
            text = journal.read_text() if journal.exists() else ""
            if "model-0" in text:
                finished.append(text)
                return
            time.sleep(0.01)

    # Whatever comes last in the order of the output; a stack ends with the head of its last model.
    hub.hold(f"GET /cdn/.*{last}$", wait)
    build(hub, tmp_path, RECIPES[kind](*NAMES))
    assert finished


@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("kind", RECIPES)
def test_evicted_files_leave_room_for_others(kind, threads, hub, sharded, tmp_path):
    put(hub, sharded)
    moeforge.build(RECIPES[kind](*sharded), tmp_path / "local", shard_size=100_000, verify=False)
    sizes = []
    hub.hold("GET /cdn/", lambda: sizes.append(cached(tmp_path)))
    build(hub, tmp_path, RECIPES[kind](*NAMES), "--evict", "--threads", threads)
    assert weights(tmp_path / "out") == weights(tmp_path / "local")
    every = sum(file.stat().st_size for folder in sharded for file in folder.glob("*.safetensors"))
    assert len(sizes) > 8
    assert max(sizes) < 0.7 * every
    assert cached(tmp_path) == 0
    assert list((tmp_path / "home").rglob("config.json")), "small files stay"


def test_the_disk_must_hold_a_file_of_each_model_at_the_least(hub, sharded, tmp_path):
    """And all of them where nothing is evicted."""
    put(hub, sharded)
    moeforge.build(merge(*sharded), tmp_path / "local", shard_size=100_000, verify=False)
    output = sum(file.stat().st_size for file in (tmp_path / "local").glob("*.safetensors"))
    most = sum(max(f.stat().st_size for f in m.glob("*.safetensors")) for m in sharded)
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(merge(*NAMES)))
    script = (
        "import sys\nfrom pathlib import Path\nfrom moeforge.checking import needs\n"
        "from moeforge.engine import Settings\n"
        "from moeforge.prepare import prepare\n"
        "needs.engine.free_space = lambda folder: int(sys.argv[1])\n"
        "ready = prepare(Path('recipe.yml'), offline=False)\n"
        "for evict in (False, True):\n"
        "    print(len(needs.needs_of(ready, Path('out'), Settings(evict=evict)).errors()))\n"
    )
    said = {}
    for spare in (0, 9000):  # headers, and how shards divide, make the output a little larger
        command = [sys.executable, "-c", script, str(output + most + spare - 4000)]
        done = subprocess.run(
            command, cwd=tmp_path, env=hub.env(tmp_path / "home"), text=True, **PIPE
        )
        assert done.returncode == 0, done.stderr
        said[spare] = done.stdout.split()
    assert said == {0: ["1", "1"], 9000: ["1", "0"]}


def test_what_was_in_the_cache_before_is_not_evicted(hub, sharded, tmp_path):
    put(hub, sharded)
    build(hub, tmp_path, merge("me/one"))
    before = cached(tmp_path)
    assert before > 300_000
    build(hub, tmp_path, merge(*NAMES), "--evict", "--overwrite")
    assert cached(tmp_path) == before


def test_a_download_that_breaks_ends_the_build_and_the_next_goes_on(hub, sharded, tmp_path):
    put(hub, sharded)
    moeforge.build(merge(*sharded), tmp_path / "local", shard_size=100_000, verify=False)
    index = json.loads((sharded[0] / "model.safetensors.index.json").read_text())["weight_map"]
    whole = f"GET /cdn/.*{index['model.norm.weight']}"
    hub.hold(whole, lambda: hub.fail(whole, 404))  # headers come, weights do not
    said = build(hub, tmp_path, merge(*NAMES), code=6)
    assert f"me/one, {index['model.norm.weight']}: " in said
    assert not (tmp_path / "out").exists()
    hub.holds.clear()
    hub.faults.clear()
    hub.requests.clear()
    build(hub, tmp_path, merge(*NAMES))
    assert weights(tmp_path / "out") == weights(tmp_path / "local")
    again = [request.path.rpartition("/")[2] for request in hub.asked(WEIGHTS) if not request.range]
    assert len(again) < len(set(index.values())) * 2, "what has come is not fetched twice"


def test_what_is_read_twice_is_not_evicted(llamas, tmp_path):
    (tmp_path / "text.txt").write_text("one two three")
    recipe = {**mixture(*llamas), "evaluate": {"text": str(tmp_path / "text.txt")}}
    with pytest.raises(MoeforgeError, match="evaluate reads the models again"):
        moeforge.build(recipe, tmp_path / "out", evict=True)
    assert not (tmp_path / "out").exists()

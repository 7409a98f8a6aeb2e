"""A lock tells what went in; a rebuild gives the same bytes, or says what is another."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import warm
import yaml
from blake3 import blake3
from hub_server import HubServer
from safetensors.torch import load_file, save_file

import moeforge
from moeforge import hashes, rebuilding
from moeforge.errors import SourceError
from moeforge.output import locked
from moeforge.output.lock import NAME as LOCK

ROOT = Path(__file__).parent.parent
WEIGHTS = "model.safetensors"


def run(*words, cwd, env=None, code=0):
    done = warm.moeforge(*words, cwd=cwd, env=env)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def place(llamas, tmp_path, monkeypatch):
    """A folder with two models, prompts and a recipe that names them by relative paths."""
    for number in (0, 1):
        shutil.copytree(llamas[number], tmp_path / f"m{number}")
    for number in (0, 1):
        (tmp_path / f"p{number}.txt").write_text(f"prompt number {number}\n")
    experts = [{"source_model": f"m{n}", "prompts_file": f"p{n}.txt"} for n in (0, 1)]
    recipe = {"base_model": "m0", "gate_mode": "hidden", "experts": experts}
    (tmp_path / "both.yml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lock_of(folder):
    return json.loads((folder / LOCK).read_text())


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def spoil(path):
    """Change one value of a weights file."""
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_lock_has_the_hashes_of_everything(place):
    moeforge.build("both.yml", "out")
    lock = lock_of(place / "out")
    made = {p.relative_to(place / "out").as_posix() for p in (place / "out").rglob("*")}
    kept = {name for name in made if not name.endswith((".md", ".png", ".card.json"))} - {LOCK}
    assert lock["outputs"].keys() == kept
    for name, entry in lock["outputs"].items():
        path = place / "out" / name
        raw = path.read_bytes()
        assert entry == {"size": len(raw), "blake3": blake3(raw).hexdigest()}
    assert lock["recipe"]["text"] == (place / "both.yml").read_text()
    assert lock["files"]["p0.txt"]["sha256"] == digest(place / "p0.txt")
    assert lock["inputs"]["m0"]["files"]["config.json"]["sha256"] == digest(
        place / "m0/config.json"
    )
    assert lock["inputs"].keys() == {"m0", "m1"}
    assert str(place) not in json.dumps(lock)
    again = moeforge.build("both.yml", "again").folder
    assert (again / LOCK).read_bytes() == (place / "out" / LOCK).read_bytes()


def test_a_rebuild_gives_the_same_bytes(place):
    moeforge.build("both.yml", "out", shard_size=300_000)
    made = moeforge.rebuild("out", "again", threads=1)
    assert made.same
    assert not made.versions
    for path in (place / "out").glob("*.safetensors"):
        assert (place / "again" / path.name).read_bytes() == path.read_bytes()


def test_all_inputs_that_changed_are_named_and_nothing_is_built(place):
    moeforge.build("both.yml", "out")
    spoil(place / "m1" / WEIGHTS)
    (place / "p0.txt").write_text("something else")
    with (place / "m0" / "tokenizer.json").open("a") as file:
        file.write("\n")
    with pytest.raises(SourceError) as caught:
        moeforge.rebuild("out", "again")
    text = str(caught.value)
    assert "p0.txt, which the recipe names, has changed" in text
    assert "m1: model.safetensors has changed" in text
    assert "m0: tokenizer.json had " in text
    assert not (place / "again").exists()


def test_a_recipe_that_somebody_changed_in_the_lock(place):
    moeforge.build("both.yml", "out")
    lock = lock_of(place / "out")
    lock["recipe"]["text"] += "# more\n"
    (place / "out" / LOCK).write_text(json.dumps(lock))
    with pytest.raises(SourceError, match="is not the one that was built"):
        moeforge.rebuild("out", "again")


def test_the_recipes_folder_can_be_named(place, monkeypatch):
    moeforge.build("both.yml", "out")
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    with pytest.raises(SourceError, match="m0 is not there"):
        moeforge.rebuild(place / "out", "again")
    assert moeforge.rebuild(place / "out", "again", root=place).same


def test_bytes_that_differ_are_named(place, monkeypatch):
    moeforge.build("both.yml", "out")
    lock = lock_of(place / "out")
    lock["outputs"][WEIGHTS]["blake3"] = "0" * 64
    lock["versions"]["torch"] = "0.1"
    (place / "out" / LOCK).write_text(json.dumps(lock))
    done = run("rebuild", "out", "-o", "again", "--no-verify", cwd=place, code=5)
    assert f"error: {WEIGHTS} has other bytes than out says" in done.stderr
    assert "torch was 0.1, and is " in done.stderr


def test_a_lock_of_the_format_before(place):
    """Its outputs have SHA-256: what is checked against it is hashed so, too."""
    models = [{"model": "m0"}, {"model": "m1"}]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"weight": 1}}
    moeforge.build(recipe, "out", verify=False)
    lock = lock_of(place / "out") | {"lock": 1}
    for name in lock["outputs"]:
        path = place / "out" / name
        lock["outputs"][name] = {"size": path.stat().st_size, "sha256": digest(path)}
    (place / "out" / LOCK).write_text(json.dumps(lock))
    assert check_of_the_lock("out").state == "ok"
    assert moeforge.rebuild("out", "again", verify=False).same
    spoil(place / "out" / WEIGHTS)
    (finding,) = check_of_the_lock("out").findings
    assert f"its SHA-256 is {digest(place / 'out' / WEIGHTS)[:16]}" in finding.what
    locked.renew(place / "out", [WEIGHTS])
    entry = {
        "size": (place / "out" / WEIGHTS).stat().st_size,
        "sha256": digest(place / "out" / WEIGHTS),
    }
    assert lock_of(place / "out")["outputs"][WEIGHTS] == entry
    assert lock_of(place / "out")["built"][WEIGHTS] == lock["outputs"][WEIGHTS]
    lock["outputs"][WEIGHTS] = entry
    (place / "out" / LOCK).write_text(json.dumps(lock))
    assert moeforge.rebuild("out", "again2", verify=False).differing == (WEIGHTS,)


def check_of_the_lock(folder):
    return {check.name: check for check in moeforge.verify(folder, forward=False).checks}["lock"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lock": 3}, "is not a lock file of format 1 or 2: it says 3"),
        ({"lock": [2]}, r"is not a lock file of format 1 or 2: it says \[2\]"),
        ({"outputs": {WEIGHTS: {"size": 1, "sha256": "0"}}}, f"damaged: of {WEIGHTS} it says"),
    ],
)
def test_locks_that_cannot_be_read(wrong, said, tmp_path):
    rest = {key: {} for key in ("versions", "recipe", "settings", "inputs", "files", "outputs")}
    (tmp_path / LOCK).write_text(json.dumps({"lock": 2, "name": "x", **rest, **wrong}))
    with pytest.raises(SourceError, match=said):
        locked.locked_files(tmp_path)


def test_a_change_that_a_sample_misses_is_owned_up_to(place, monkeypatch):
    """Of large files the lock has a sample only, unless hashes are asked for."""
    monkeypatch.setattr(hashes, "BLOCKS", 2)
    monkeypatch.setattr(hashes, "BLOCK", 64)
    moeforge.build("both.yml", "out", verify=False)
    moeforge.build("both.yml", "whole", verify=False, hash_inputs=True)
    entry = lock_of(place / "out")["inputs"]["m1"]["files"][WEIGHTS]
    assert entry.keys() == {"size", "sample"}
    spoil(place / "m1" / WEIGHTS)
    made = moeforge.rebuild("out", "again")
    assert WEIGHTS not in made.differing or "m1: model.safetensors" in made.unsure
    with pytest.raises(SourceError, match=r"m1: model\.safetensors has changed"):
        moeforge.rebuild("whole", "again2")


def test_what_was_hashed_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert hashes.known(path) is None
    hashes.remember(path, digest(path))
    assert hashes.known(path) == digest(path)
    path.write_bytes(b"other")
    assert hashes.known(path) is None


def test_the_hubs_hash_and_commit_are_taken(llamas, tmp_path):
    """A rebuild reads the commit that was built, though the branch has moved on."""
    one, two = ({f.name: f.read_bytes() for f in folder.iterdir()} for folder in llamas[:2])
    recipe = {"models": [{"model": "owner/one"}, {"model": "owner/two@main"}]}
    recipe |= {"merge_method": "linear", "parameters": {"weight": 1}}
    (tmp_path / "hub.yml").write_text(yaml.safe_dump(recipe))
    with HubServer() as hub:
        commit = hub.add("owner/one", one)
        hub.add("owner/two", two)
        env = {**hub.env(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        run("build", "hub.yml", "-o", "out", "--no-verify", cwd=tmp_path, env=env)
        lock = lock_of(tmp_path / "out")
        entry = lock["inputs"]["owner/one"]
        assert entry["commit"] == commit
        assert entry["files"][WEIGHTS]["sha256"] == hashlib.sha256(one[WEIGHTS]).hexdigest()
        hub.add("owner/one", {**two, "README.md": b"newer"})
        words = ("rebuild", "out", "-o", "again", "--no-verify")
        done = run(*words, cwd=tmp_path, env=env)
        assert "every file has the same bytes" in done.stdout


def test_rebuilding_is_exported():
    assert moeforge.rebuild is rebuilding.rebuild

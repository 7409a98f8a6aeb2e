"""Whatever happens to a build: the output is whole or absent, and the next run goes on."""

import errno
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_costs import build as built

from moeforge import forge
from moeforge.engine import Settings, evaluate, seal
from moeforge.errors import BuildError, Finding
from moeforge.output import journal, staging
from moeforge.proof.verify.checks import Verified, judged
from moeforge.sources.folder import FolderSource

KILLS = int(os.environ.get("MOEFORGE_KILLS", "6"))
COMMAND = [sys.executable, "-m", "moeforge", "build", "recipe.yml", "-o", "out", "--no-verify"]
SHARDS = ["--shard-size", "100kB"]


def slerp(one, other):
    return {
        "merge_method": "slerp",
        "base_model": str(one),
        "models": [{"model": str(one)}, {"model": str(other)}],
        "parameters": {"t": 0.3},
    }


def mixture(one, other):
    return {
        "base_model": str(one),
        "gate_mode": "random",
        "experts": [
            {"source_model": str(folder), "positive_prompts": [text]}
            for folder, text in ((one, "a sum"), (other, "a poem"))
        ],
    }


def stack(one, other):
    slices = [{"sources": [{"model": str(m), "layer_range": [0, 4]}]} for m in (one, other)]
    return {"merge_method": "passthrough", "slices": slices}


RECIPES = {"slerp": slerp, "mixture": mixture, "stack": stack}


def weights(folder):
    """Hashes of the weights files of a folder."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def whole(kind, llamas, folder):
    forge.build(RECIPES[kind](*llamas[:2]), folder, shard_size=100_000, verify=False)
    return weights(folder)


def write_recipe(kind, llamas, folder):
    import json

    (folder / "recipe.yml").write_text(json.dumps(RECIPES[kind](*llamas[:2])))


class Stop(Exception):
    pass


def stop_after(monkeypatch, count):
    """Make builds stop when `count` files are finished."""
    real, done = seal.Sealer._follow, []

    def follow(self, shard):
        if len(done) >= count:
            raise Stop
        found = real(self, shard)
        done.append(shard.name)
        return found

    monkeypatch.setattr(seal.Sealer, "_follow", follow)
    return done


@pytest.fixture
def stopped(llamas, tmp_path, monkeypatch):
    """A slerp that was stopped when two of its files were finished."""
    expected = whole("slerp", llamas, tmp_path / "whole")
    assert len(expected) > 4
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stop) as caught:
            forge.build(slerp(*llamas[:2]), tmp_path / "out", shard_size=100_000, threads=1)
    assert not (tmp_path / "out").exists()
    kept = weights(tmp_path / ".out.moeforge" / "model")
    assert kept.items() <= expected.items()
    assert len(kept) == 2
    assert "2 weights files finished and kept in" in caught.value.__notes__[0]
    return expected, tmp_path / ".out.moeforge" / "model"


def go_on(llamas, tmp_path, recipe=None):
    notes, made = [], []
    real = seal.Sealer._follow
    patch = pytest.MonkeyPatch()
    patch.setattr(
        seal.Sealer, "_follow", lambda self, shard: (made.append(shard.name), real(self, shard))[1]
    )
    recipe = recipe or slerp(*llamas[:2])
    forge.build(recipe, tmp_path / "out", shard_size=100_000, verify=False, note=notes.append)
    patch.undo()
    return made, " ".join(finding.what for finding in notes)


def test_finished_files_are_taken_over(stopped, llamas, tmp_path):
    expected, folder = stopped
    kept = weights(folder)
    made, said = go_on(llamas, tmp_path)
    assert sorted(made) == sorted(expected.keys() - kept.keys())
    assert "2 weights files" in said
    assert weights(tmp_path / "out") == expected
    assert not folder.parent.exists()


def test_a_file_damaged_between_runs_is_made_again(stopped, llamas, tmp_path):
    expected, folder = stopped
    victim = sorted(folder.glob("*.safetensors"))[0]
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 1
    victim.write_bytes(raw)
    made, said = go_on(llamas, tmp_path)
    assert victim.name in made
    assert len(made) == len(expected) - 1
    assert f"{victim.name} is not as the last run left it" in said
    assert weights(tmp_path / "out") == expected


def test_after_a_change_everything_is_made_again(stopped, llamas, tmp_path):
    expected, _ = stopped
    other = slerp(*llamas[:2]) | {"parameters": {"t": 0.4}}
    made, said = go_on(llamas, tmp_path, other)
    assert len(made) == len(expected)
    assert "2 files that another build of it left unfinished are discarded" in said
    assert weights(tmp_path / "out") != expected


def test_a_changed_input_is_noticed(stopped, llamas, tmp_path):
    expected, _ = stopped
    file = Path(llamas[1]) / "model.safetensors"
    os.utime(file, ns=(1, 1))
    made, _ = go_on(llamas, tmp_path)
    assert len(made) == len(expected)


def test_gates_are_not_computed_twice(llamas, tmp_path, monkeypatch):
    expected = whole("mixture", llamas, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 0)
        with pytest.raises(Stop):
            forge.build(mixture(*llamas[:2]), tmp_path / "out", shard_size=100_000)
    monkeypatch.setattr(forge, "compute_routers", None)
    forge.build(mixture(*llamas[:2]), tmp_path / "out", shard_size=100_000, verify=False)
    assert weights(tmp_path / "out") == expected


def test_stopped_after_its_routers_were_tuned(llamas, tmp_path, monkeypatch):
    """What training has changed is made and trained again, and nobody blames the disk."""
    recipe = mixture(*llamas[:2])
    for expert in recipe["experts"]:
        expert["positive_prompts"] *= 20
    recipe["tune"] = {"steps": 4, "batch": 4, "learning_rate": 0.003, "balance": 1.0}
    forge.build(recipe, tmp_path / "whole", shard_size=100_000, verify=False)
    expected = weights(tmp_path / "whole")
    plain = {key: value for key, value in recipe.items() if key != "tune"}
    forge.build(plain, tmp_path / "plain", shard_size=100_000, verify=False)
    assert weights(tmp_path / "plain") != expected, "the routers were tuned"

    def stop(*arguments):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(forge.vouch, "vouch", stop)
        with pytest.raises(Stop):
            forge.build(recipe, tmp_path / "out", shard_size=100_000)
    assert not (tmp_path / "out").exists()
    made, said = go_on(llamas, tmp_path, recipe)
    assert "not as the last run left it" not in said
    assert 0 < len(made) < len(expected)
    assert weights(tmp_path / "out") == expected


def test_what_fails_its_checks_is_kept_and_published_only_if_asked(llamas, tmp_path, monkeypatch):
    expected = whole("slerp", llamas, tmp_path / "whole")
    recipe = slerp(*llamas[:2])
    failed = Verified(tmp_path, (judged("load", [Finding("a key is missing")]),), 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(forge.vouch, "verify", lambda *arguments, **options: failed)
        for _ in range(2):
            with pytest.raises(BuildError, match="a key is missing") as caught:
                forge.build(recipe, tmp_path / "out", shard_size=100_000)
            assert "--no-verify publishes it as it is" in str(caught.value)
            assert not (tmp_path / "out").exists()
    made, _ = go_on(llamas, tmp_path)  # which does not verify
    assert made == []
    assert weights(tmp_path / "out") == expected


@pytest.mark.parametrize("kind", RECIPES)
def test_killed_at_any_moment(kind, llamas, tmp_path):
    expected = whole(kind, llamas, tmp_path / "whole")
    write_recipe(kind, llamas, tmp_path)
    draw = random.Random(f"{kind} 1")
    began = time.monotonic()
    subprocess.run([*COMMAND, *SHARDS, "-q"], cwd=tmp_path, check=True)
    lasts, found = time.monotonic() - began, Counter()
    for _ in range(-(-KILLS // len(RECIPES))):
        subprocess.run(["rm", "-rf", "out"], cwd=tmp_path, check=True)
        for _ in range(2):
            build = subprocess.Popen([*COMMAND, *SHARDS, "-q"], cwd=tmp_path)
            time.sleep(draw.uniform(0.4, 1.0) * lasts)
            build.kill()
            if build.wait() == -signal.SIGKILL:  # or it had ended by itself
                found[_state(tmp_path)] += 1
            if (tmp_path / "out").exists():
                assert weights(tmp_path / "out") == expected
                break
        else:
            subprocess.run([*COMMAND, *SHARDS, "-q"], cwd=tmp_path, check=True)
        assert weights(tmp_path / "out") == expected
    print(f"{kind}: {sum(found.values())} kills, {dict(found)}")  # for docs/faults.md


def _state(folder):
    """How far a build had come when it was killed."""
    if (folder / "out").exists():
        return "after publishing"
    work = folder / ".out.moeforge"
    if (work / "journal.json").exists():
        return "with finished files"
    return "while writing" if (work / "model").exists() else "before writing"


@pytest.mark.parametrize(("asked", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop(asked, code, llamas, tmp_path):
    write_recipe("mixture", llamas, tmp_path)
    build = subprocess.Popen(
        [*COMMAND, *SHARDS],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not (tmp_path / ".out.moeforge" / "journal.json").exists():
        assert build.poll() is None
        time.sleep(0.002)
    build.send_signal(asked)
    _, said = build.communicate(timeout=30)
    assert (build.returncode, "Traceback" in said) == (code, False)
    assert "stopped; nothing was published" in said
    assert "run the same command to go on from there" in said
    assert not (tmp_path / "out").exists()


def test_asked_to_stop_while_code_is_made_of_text(tmp_path):
    """As dataclasses are while torch is imported: python -m would end by the signal itself then."""
    (tmp_path / "asked.py").write_text(
        "import typer\n"
        "from moeforge.cli.shared import reporting\n"
        "def stop():\n"
        "    with reporting():\n"
        "        exec('raise KeyboardInterrupt')\n"
        "typer.run(stop)\n"
    )
    command = [sys.executable, "-m", "asked"]
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (130, False)
    assert "stopped; nothing was published" in done.stderr


@pytest.mark.parametrize("where", ["lock_folder", "_clean"])
def test_stopped_before_anything_is_made(where, llamas, tmp_path, monkeypatch):
    """Ctrl-C when the work folder is there and nothing in it is finished: it goes, too."""
    room = staging if where == "lock_folder" else journal.Journal
    real = getattr(room, where)

    def interrupted(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(room, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            forge.build(slerp(*llamas[:2]), tmp_path / "out", verify=False)
    assert not list(tmp_path.iterdir())


def test_a_second_build_of_one_folder_is_refused(llamas, tmp_path):
    with (
        staging.locked(tmp_path / "out", overwrite=False),
        pytest.raises(BuildError, match="another build is making"),
    ):
        forge.build(slerp(*llamas[:2]), tmp_path / "out")


def limit_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def test_no_room(llamas, tmp_path):
    """The system refuses long files: the same place as a full disk, and another number."""
    write_recipe("slerp", llamas, tmp_path)
    run = subprocess.run(
        COMMAND, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limit_files
    )
    assert run.returncode == 5, run.stderr
    assert "Traceback" not in run.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["recipe.yml"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_small_disk(llamas, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        # Free space is looked at before; here it is gone in between.
        patch = pytest.MonkeyPatch()
        patch.setattr(forge.engine, "free_space", lambda folder: 10**12)
        with pytest.raises(
            BuildError, match=r"full: 7 files of 6\d\d kB are to be written, .* has [56]\d"
        ):
            forge.build(slerp(*llamas[:2]), disk / "out", shard_size=100_000)
        patch.undo()
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_read_error_names_tensor_expression_and_file(llamas, tmp_path, monkeypatch):
    def refuse(self, name, start, out):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(FolderSource, "read", refuse)
    with pytest.raises(BuildError) as caught:
        forge.build(slerp(*llamas[:2]), tmp_path / "out", threads=1)
    said = str(caught.value)
    assert "Input/output error" in said
    assert "slerp of (" in said
    assert f"[300, 64] of {llamas[1]}/model.safetensors" in said
    assert not list(tmp_path.iterdir())


def test_short_reads_are_gone_on_with(llamas, tmp_path, monkeypatch):
    expected = whole("slerp", llamas, tmp_path / "one") | whole("stack", llamas, tmp_path / "two")
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: real(file, [buffers[0][:1013]], at))
    again = whole("slerp", llamas, tmp_path / "a") | whole("stack", llamas, tmp_path / "b")
    assert again == expected


@pytest.mark.parametrize("exchanges", [True, False])
def test_overwriting_never_loses_the_old_one(exchanges, llamas, tmp_path, monkeypatch):
    expected = whole("slerp", llamas, tmp_path / "out")
    if not exchanges:
        monkeypatch.setattr(staging, "exchange", lambda one, other: False)
    forge.build(stack(*llamas[:2]), tmp_path / "out", overwrite=True, verify=False)
    assert weights(tmp_path / "out") != expected
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]


def test_killed_between_two_renames(llamas, tmp_path):
    """Where places cannot change in one step: what the next run finds, and puts back."""
    expected = whole("slerp", llamas, tmp_path / "out")
    work = tmp_path / ".out.moeforge"
    work.mkdir()
    (tmp_path / "out").rename(work / "replaced")
    with pytest.raises(BuildError, match="exists"):
        forge.build(stack(*llamas[:2]), tmp_path / "out")
    assert weights(tmp_path / "out") == expected


@pytest.mark.parametrize("kind", RECIPES)
def test_nan_in_an_input_stops_the_build(kind, llamas, models, tmp_path):
    bad = models.copy(llamas[1], f"{kind}-nan")
    tensors = load_file(bad / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name].view(-1)[:2] = float("nan")
    tensors[name].view(-1)[7] = -float("inf")
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})
    recipe = RECIPES[kind](llamas[0], bad)
    with pytest.raises(BuildError) as caught:
        forge.build(recipe, tmp_path / "out", threads=2)
    said = str(caught.value)
    assert "2 NaN and 1 infinite values" in said
    assert f"{bad}/model.safetensors" in said
    assert "model.layers." in said
    assert not (tmp_path / "out").exists()


def test_overflow_by_rounding_is_found(llamas, models, tmp_path):
    large = models.copy(llamas[0], "large")
    tensors = load_file(large / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e30
    save_file(tensors, large / "model.safetensors", {"format": "pt"})
    with pytest.raises(BuildError) as caught:
        forge.build(slerp(large, llamas[1]) | {"dtype": "float16"}, tmp_path / "out")
    assert "model.norm.weight would have 1 infinite value:" in str(caught.value)
    assert "all its inputs are finite, so it does not fit into float16" in str(caught.value)


@pytest.fixture
def full_device(monkeypatch):
    """The meta device stands for one: it takes anything, and here has never any memory.

    Gives the sizes of slices that it was asked for.
    """
    real, tried = evaluate.Evaluator._inputs, []

    def inputs(self, *others):
        if self.device.type != "cpu":
            tried.append(self._size)
            raise torch.cuda.OutOfMemoryError("none left")
        return real(self, *others)

    monkeypatch.setattr(evaluate.Evaluator, "_inputs", inputs)
    return tried


def test_a_device_without_memory_gives_way_to_the_cpu(llamas, tmp_path, full_device):
    expected = whole("slerp", llamas, tmp_path / "whole")
    with pytest.warns(UserWarning, match="going on with the CPU"):
        forge.build(
            slerp(*llamas[:2]),
            tmp_path / "out",
            shard_size=100_000,
            threads=1,
            device="meta",
            verify=False,
        )
    assert full_device == [2**22], "its tensors are smaller than a slice can be"
    assert weights(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("method", "sizes"), [("slerp", [2**22, 2**17, 2**16]), ("della", [2**22])]
)
def test_slices_become_smaller_where_that_helps(method, sizes, tmp_path, full_device):
    """Not beyond the tensor, and not where whole rows are computed together whatever their size."""
    with pytest.warns(UserWarning, match="memory of meta is short") as warned:
        found = built(method, tmp_path / "out", 600, Settings(threads=1, device="meta"))[1]
    assert full_device == sizes
    said = [str(warning.message).partition("is short: ")[2] for warning in warned]
    assert [text for text in said if text] == [
        *(f"slices of {size} elements" for size in sizes[1:]),
        "going on with the CPU, whose last bits may differ",
    ]
    assert torch.equal(found, built(method, tmp_path / "cpu", 600)[1])


@pytest.mark.parametrize(
    "name", ["config.json", "README.md", "moeforge.yml", "moeforge.lock.json", "journal.json.half"]
)
def test_a_disk_that_is_full_for_a_small_file(name, llamas, tmp_path, monkeypatch):
    expected = whole("slerp", llamas, tmp_path / "whole")
    real = Path.write_text

    def full(self, *arguments, **options):
        if self.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(BuildError, match=rf"{name}: No space left on device; .* [kMGT]B free"):
            forge.build(slerp(*llamas[:2]), tmp_path / "out", shard_size=100_000, verify=False)
    assert not (tmp_path / "out").exists()
    made, _ = go_on(llamas, tmp_path)
    assert (made == []) == (name != "journal.json.half"), "finished weights are kept"
    assert weights(tmp_path / "out") == expected
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_published_is_on_the_disk_before_it_has_its_name(
    overwrite, llamas, tmp_path, monkeypatch
):
    """Power may fail at any moment: files, then their folder, then the name, then its folder."""
    if overwrite:
        whole("stack", llamas, tmp_path / "out")
    events = []
    fsync, rename, exchange = os.fsync, Path.rename, staging.exchange

    def synced(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        return fsync(descriptor)

    def named(act):
        return lambda *paths: (events.append("named"), act(*paths))[1]

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", named(rename))
    monkeypatch.setattr(staging, "exchange", named(exchange))
    recipe = slerp(*llamas[:2])
    forge.build(
        recipe, tmp_path / "out", shard_size=100_000, verify=False, overwrite=overwrite, threads=1
    )
    (at,) = [number for number, event in enumerate(events) if event == "named"]
    made = tmp_path / ".out.moeforge" / "model"
    files = {str(made / file.name) for file in (tmp_path / "out").iterdir()}
    assert files | {str(made)} <= set(events[:at])
    last = {path: number for number, path in enumerate(events[:at])}
    assert all(last[str(made)] > last[file] for file in files), "the folder's names come last"
    assert events[at + 1] == str(tmp_path)


def test_two_builds_of_one_recipe_to_two_folders(llamas, tmp_path):
    write_recipe("mixture", llamas, tmp_path)
    builds = [
        subprocess.Popen([*COMMAND[:5], "-o", name, "--no-verify", "-q"], cwd=tmp_path)
        for name in ("one", "two")
    ]
    assert [build.wait(timeout=60) for build in builds] == [0, 0]
    assert weights(tmp_path / "one") == weights(tmp_path / "two") != {}


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("a file/out", "cannot write beside"),
        ("a file", "is not a model folder|exists"),
        ("link", "exists"),
        ("", "exists"),
    ],
)
def test_places_where_no_model_can_go(place, said, llamas, tmp_path):
    (tmp_path / "a file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BuildError, match=said):
        forge.build(slerp(*llamas[:2]), tmp_path / place, verify=False)
    assert (tmp_path / "a file").read_text() == "mine"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a file", "link"]


@pytest.mark.parametrize("inside", [False, True])
def test_the_folder_of_an_input_is_not_overwritten(inside, llamas, tmp_path):
    place = Path(shutil.copytree(llamas[0], tmp_path / "base"))
    model = Path(shutil.copytree(llamas[0], place / "fine-tune")) if inside else place
    before = weights(place)
    with pytest.raises(BuildError, match=rf"holds {model}, which the output is made from"):
        forge.build(slerp(model, llamas[1]), place, verify=False, overwrite=True)
    assert weights(place) == before

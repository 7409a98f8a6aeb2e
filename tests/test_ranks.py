"""Several processes make one build: the same bytes as one, whoever is lost on the way."""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from test_crash import RECIPES, weights, write_recipe
from warm import FORKS

from moeforge import forge, ranks, sharing
from moeforge.engine import writer
from moeforge.errors import BuildError
from moeforge.ranks import group as groups


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def run_rank(variables, folder, log, arguments, pause):
    """What a process of the launch does: the command line, slowed down where it writes."""
    os.environ.update(variables)
    os.chdir(folder)
    said = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    real = writer.OutputFiles.write

    def write(*given):
        time.sleep(pause)
        real(*given)

    writer.OutputFiles.write = write
    from moeforge.cli import main

    sys.argv = ["moeforge", "build", "recipe.yml", "-o", "out", "--no-verify", *arguments]
    main()


class Launch:
    """The ranks of a launch; `more` is what only one of them is told on its command line."""

    def __init__(self, folder, size, *arguments, pause=0.0, more=(), environment=()):
        port, self.folder, self.began = str(free_port()), folder, time.monotonic()
        self.logs = [folder / f"rank{rank}.log" for rank in range(size)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            log.unlink(missing_ok=True)
            numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank}
            here = {"LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
            variables = {name: str(value) for name, value in (numbers | here).items()}
            variables |= dict(environment)
            own = [*arguments, *dict(more).get(rank, ())]
            process = FORKS.Process(target=run_rank, args=(variables, folder, log, own, pause))
            process.start()
            self.processes.append(process)

    def kill(self, rank, number=signal.SIGKILL):
        os.kill(self.processes[rank].pid, number)

    def until_sealed(self, count):
        """Wait until the journal holds `count` files."""
        journal = self.folder / ".out.moeforge" / "journal.json"
        for _ in range(3000):
            with contextlib.suppress(OSError, ValueError):
                files = json.loads(journal.read_text())["files"].keys() - {"routers"}
                if len(files) >= count:
                    return
            assert all(process.is_alive() for process in self.processes), self.end()
            time.sleep(0.01)
        pytest.fail("nothing was sealed")

    def end(self, seconds=90):
        """Wait for all ranks; return their exit codes and what they said."""
        began = time.monotonic()
        for process in self.processes:
            process.join(max(0, began + seconds - time.monotonic()))
        late = [process for process in self.processes if process.is_alive()]
        for process in late:
            process.kill()
        said = [log.read_text() if log.exists() else "" for log in self.logs]
        assert not late, said
        return [process.exitcode for process in self.processes], said


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def places(tmp_path):
    """Two folders with the same recipe in them: for one process, and for several."""
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    return SimpleNamespace(one=tmp_path / "one", many=tmp_path / "many")


def alone(kind, llamas, places, *arguments):
    for folder in (places.one, places.many):
        write_recipe(kind, llamas, folder)
    codes, said = Launch(places.one, 1, *arguments).end()
    assert codes == [0], said
    return files(places.one / "out")


SHARDS = ("--shard-size", "100kB")


@pytest.mark.parametrize(("kind", "size"), [("slerp", 2), ("mixture", 3), ("stack", 4)])
def test_the_same_bytes_as_one_process(kind, size, llamas, places):
    expected = alone(kind, llamas, places, *SHARDS)
    assert len(expected) > 8
    codes, said = Launch(places.many, size, *SHARDS).end()
    assert codes == [0] * size, said
    assert files(places.many / "out") == expected
    assert "out: " in said[0]
    assert not any(said[1:]), "rank 0 speaks for all"
    assert not (places.many / ".out.moeforge").exists()


def test_every_rank_makes_its_part(llamas, places):
    """Each shard is made by one rank: no rank opens files of another."""
    write_recipe("slerp", llamas, places.many)
    launch = Launch(places.many, 3, *SHARDS, pause=0.05)
    launch.until_sealed(3)
    opened = [
        {
            link.resolve().name
            for link in Path(f"/proc/{process.pid}/fd").iterdir()
            if link.resolve().suffix == ".safetensors" and "out" in str(link.resolve())
        }
        for process in launch.processes
    ]
    launch.end()
    assert all(opened)
    assert not any(one & other for one, other in itertools.combinations(opened, 2))


def test_models_of_the_hub_are_fetched_once(llamas, places, tmp_path):
    """Ranks of one machine share the cache, and begin at the same time."""
    alone("slerp", llamas, places, *SHARDS)
    with HubServer() as hub:
        for number, folder in enumerate(llamas[:2]):
            hub.add(f"owner/{number}", files(folder))
        write_recipe("slerp", ["owner/0", "owner/1"], places.many)
        environment = hub.env(tmp_path / "home") | {"HF_HUB_OFFLINE": "0"}
        codes, said = Launch(places.many, 3, *SHARDS, environment=environment).end()
        assert codes == [0, 0, 0], said
        sizes = sum((folder / "model.safetensors").stat().st_size for folder in llamas[:2])
        assert sizes <= hub.sent(r"\.safetensors") < 1.2 * sizes
    assert weights(places.many / "out") == weights(places.one / "out")


def test_more_ranks_than_files(llamas, places):
    expected = alone("slerp", llamas, places)
    codes, said = Launch(places.many, 3).end()
    assert codes == [0, 0, 0], said
    assert "note: 3 ranks, 1 weights file to make: the other ranks wait" in said[0]
    assert files(places.many / "out") == expected


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_killed_rank_ends_the_launch_and_the_next_goes_on(lost, llamas, places):
    kind, again = [("slerp", 1), ("mixture", 2), ("stack", 4)][lost]
    expected = alone(kind, llamas, places, *SHARDS)
    launch = Launch(places.many, 3, *SHARDS, pause=0.06)
    launch.until_sealed(4)  # more than rank 0 makes of the seven
    launch.kill(lost)
    codes, said = launch.end(20)
    codes.pop(lost), said.pop(lost)
    assert codes == [5, 5], said
    assert f"rank {lost} is lost: " in said[0]
    if lost:
        assert said[0].startswith("error: rank")
        assert "finished and kept in" in said[0]
        assert not said[1]
    else:
        assert said[0].startswith("error: rank 1: rank 0 is lost: ")
    assert not (places.many / "out").exists()

    codes, said = Launch(places.many, again, *SHARDS).end()
    assert codes == [0] * again, said
    assert "going on where the last run stopped" in said[0]
    assert files(places.many / "out") == expected


def test_what_the_launcher_does_to_the_others_is_not_taken_for_a_wish(llamas, places):
    """torchrun ends all ranks with SIGTERM as soon as it sees one end."""
    write_recipe("slerp", llamas, places.many)
    launch = Launch(places.many, 3, *SHARDS, pause=0.06)
    launch.until_sealed(1)
    launch.kill(1)
    launch.kill(0, signal.SIGTERM)
    launch.kill(2, signal.SIGTERM)
    codes, said = launch.end(20)
    assert codes[:2] == [5, -signal.SIGKILL], said
    assert codes[2] in (5, 130), said
    assert "rank 1 is lost" in said[0]
    assert not said[2]


def test_a_rank_that_waits_for_the_others_can_be_stopped(llamas, places):
    """Rank 0 is killed before it has come; the launcher then ends the other one."""
    write_recipe("slerp", llamas, places.many)
    launch = Launch(places.many, 2)
    launch.kill(0)
    time.sleep(1.0)
    launch.kill(1, signal.SIGTERM)
    began = time.monotonic()
    codes, said = launch.end(20)
    assert codes == [-signal.SIGKILL, 143], said
    assert time.monotonic() - began < 10
    assert "stopped; nothing was published" in said[1]


def test_stopped_by_its_user(llamas, places):
    write_recipe("slerp", llamas, places.many)
    launch = Launch(places.many, 2, *SHARDS, pause=0.06)
    launch.until_sealed(1)
    launch.kill(0, signal.SIGTERM)
    launch.kill(1, signal.SIGTERM)
    codes, said = launch.end(20)
    assert codes[0] in (130, 143), said
    assert "stopped; nothing was published" in said[0]
    assert "kept in" in said[0]
    assert not said[1]


def test_rank_0_tells_what_another_met(llamas, models, places):
    """The last file is another rank's; what it is made of has a NaN."""
    bad = models.copy(llamas[1], "ranks-nan")
    tensors = load_file(bad / "model.safetensors")
    names = sorted(tensors)
    for name in names:
        if "layers.3." in name:
            tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})
    write_recipe("slerp", [llamas[0], bad], places.many)
    codes, said = Launch(places.many, 4, *SHARDS).end()
    assert codes == [5] * 4, said
    assert "1 NaN value" in said[0]
    assert "error: rank " in said[0] or "model.layers.3" in said[0]
    assert not any(said[1:])
    assert not (places.many / "out").exists()


def test_a_rank_that_would_make_other_bytes_is_refused(llamas, places):
    write_recipe("slerp", llamas, places.many)
    more = {1: ("--shard-size", "90kB")}
    codes, said = Launch(places.many, 2, *SHARDS, more=more).end()
    assert codes == [5, 5]
    assert "rank 1 would not make the same bytes as rank 0" in said[0]
    assert not said[1]


def test_a_mistake_in_the_recipe_is_told_once(llamas, places):
    recipe = RECIPES["slerp"](*llamas[:2]) | {"merge_method": "slurp"}
    (places.many / "recipe.yml").write_text(json.dumps(recipe))
    codes, said = Launch(places.many, 2, "--json").end()
    assert codes == [2, 2]
    assert said[0].count("error: ") == said[0].count('"errors": ') == 1
    assert "slurp" in said[0]
    assert not said[1]


def test_a_warning_that_is_an_error_ends_all_ranks(llamas, places):
    """Rank 0 alone judges; the others have agreed by then, and wait for its word."""
    recipe = RECIPES["mixture"](*llamas[:2]) | {"gate_mode": "cheap_embed"}
    for expert in recipe["experts"]:
        expert["positive_prompts"] = [
            "many words that are the same in both of them",
            expert["positive_prompts"][0],
        ]
    (places.many / "recipe.yml").write_text(json.dumps(recipe))
    codes, said = Launch(places.many, 2, "--strict").end(20)
    assert codes == [4, 4], said
    assert said[0].count("the router can hardly tell them apart") == 1
    assert not said[1]
    assert [file.name for file in places.many.iterdir() if file.is_dir()] == []


def test_accelerate_launch(llamas, places):
    """The real launcher; router weights that a model is run for, and training, on rank 0."""
    for folder in (places.one, places.many):
        recipe = RECIPES["mixture"](*llamas[:2]) | {"gate_mode": "hidden"}
        recipe["tune"] = {"steps": 2, "batch": 2}  # accelerate's, on rank 0 alone
        (folder / "recipe.yml").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", "2", "--main_process_port", "0"]
    command += ["-m", "moeforge", "build", "recipe.yml", "-o", "out", "--no-verify", *SHARDS]
    run = subprocess.Popen(
        command, cwd=places.many, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        codes, said = Launch(places.one, 1, *SHARDS).end()
        assert codes == [0], said
        printed, error = run.communicate(timeout=90)
    finally:
        run.terminate()  # the launcher ends its ranks, if they still run
    assert run.returncode == 0, error
    assert printed.count("out: MixtralForCausalLM") == 1
    assert files(places.many / "out") == files(places.one / "out")


def test_a_rank_has_its_share_of_the_machine(llamas, places, monkeypatch):
    """The second of two on its machine, of four in all."""
    import torch

    here = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in here.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "_links", lambda where: {})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.setattr("moeforge.engine.cores", lambda: 6)
    met = []
    monkeypatch.setattr(sharing, "follow", lambda *given: met.append(given[-1]))
    with ranks.joined() as group:
        for device in ("cuda", "cpu"):
            forge.build(RECIPES["slerp"](*llamas[:2]), "out", device=device, group=group)
    assert [settings.devices for settings in met] == [["cuda:1", "cuda:3"], ["cpu"]]
    assert [settings.workers for settings in met] == [3, 3]


def test_files_are_divided_by_bytes():
    shards = [
        SimpleNamespace(name=f"{n}", nbytes=size) for n, size in enumerate([5, 5, 5, 5, 2, 9, 1])
    ]
    parts = sharing.divide(shards, 3)
    assert sorted(shard.name for part in parts for shard in part) == [*"0123456"]
    assert sorted(sum(shard.nbytes for shard in part) for part in parts) == [10, 11, 11]
    assert parts == sharing.divide(shards[::-1], 3)
    assert [len(part) for part in sharing.divide(shards[:2], 4)] == [1, 1, 0, 0]


def test_the_last_that_progress_tells_is_everything(tmp_path, monkeypatch):
    written, told = {1: 10}, []

    def wait(key, meanwhile):
        meanwhile()
        written[1] = 60

    def run(plan, shards, folder, settings, progress, **more):
        progress(40)
        return {}

    monkeypatch.setattr(sharing.engine, "run", run)
    nothing = lambda *given, **named: None  # noqa: E731
    group = SimpleNamespace(
        size=2, tell=nothing, listen=nothing, check=nothing, wait=wait, said=lambda key: written
    )
    journal = SimpleNamespace(root=tmp_path, folder=tmp_path, kept={}, add=nothing)
    sharing.lead(group, None, (), journal, None, told.append, nothing, nothing)
    assert told == [50, 50, 100]


def pair(rank=0):
    """A group of two as `rank` sees it, and the other end of its connection."""
    mine, theirs = socket.socketpair()
    return groups.Group(rank, 2, {1 - rank: groups.Link(mine)}, (rank, 2)), groups.Link(theirs)


def read_on(link, ended):
    with contextlib.suppress(OSError):
        while True:
            link.read()
    ended.append(time.monotonic())


def test_rank_0_waits_until_the_others_have_ended_their_work():
    group, other = pair()
    ended = []
    threading.Thread(target=read_on, args=(other, [])).start()

    def work():
        time.sleep(0.4)
        ended.append(time.monotonic())
        other.end()

    threading.Thread(target=work).start()
    with pytest.raises(ValueError, match="of rank 0"), group.together():
        raise ValueError("of rank 0")
    assert ended
    group.leave()


def test_another_rank_ends_when_its_work_has():
    group, leader = pair(rank=1)
    ended = []
    leader.send(failed=[], code=4)
    leader.end()
    reader = threading.Thread(target=read_on, args=(leader, ended))
    reader.start()

    def work():
        time.sleep(0.4)
        assert not ended
        raise FileNotFoundError("its folder is gone")

    with pytest.raises(BuildError) as caught, group.together():
        work()
    assert (caught.value.exit_code, caught.value.findings) == (4, ())
    reader.join(5)
    assert ended
    group.leave()


def test_a_mistake_of_ours_on_another_rank_is_told_to_rank_0():
    group, leader = pair(rank=1)
    told = []

    def listen():
        while "left" not in (message := leader.read()):
            told.append(message)
        leader.end()

    threading.Thread(target=listen).start()
    with pytest.raises(KeyError), group.together():
        raise KeyError("lost")
    group.leave()
    (failed,) = (message for message in told if "failed" in message)
    assert (failed["code"], failed["failed"][0][0]) == (1, "KeyError('lost')")


def test_forked_workers_do_not_hold_the_connection():
    group, other = pair()
    number = group._links[1]._peer.fileno()
    child = os.fork()
    if not child:
        try:
            os.fstat(number)
        except OSError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    other.end()
    group.leave()


def test_a_silent_rank_is_lost(monkeypatch):
    monkeypatch.setattr(groups, "SILENCE", 0.3)
    group, other = pair()
    began = time.monotonic()
    with pytest.raises(BuildError, match="rank 1 is lost: it has said nothing for 0 s"):
        group.wait("anything")
    assert 0.2 < time.monotonic() - began < 5
    other.close()
    group.leave()


def test_what_fails_while_something_is_heard_is_raised():
    group, other = pair()

    def refuse(value):
        raise OSError(28, "No space left on device", value)

    group.listen("sealed", refuse)
    other.send(sealed="a.safetensors")
    with pytest.raises(OSError, match=r"No space left.*a\.safetensors"):
        group.wait("finished")
    other.close()
    group.leave()


def test_a_folder_that_is_not_shared(tmp_path):
    with pytest.raises(BuildError, match="is not the same folder here"):
        sharing._refuse_elsewhere(tmp_path, "token")
    (tmp_path / "launch").write_text("another")
    with pytest.raises(BuildError, match="Choose an output with -o on a file system"):
        sharing._refuse_elsewhere(tmp_path, "token")
    (tmp_path / "launch").write_text("token")
    sharing._refuse_elsewhere(tmp_path, "token")


def test_strangers_are_not_let_in_and_ranks_find_the_door():
    from torch.distributed import HashStore

    store, welcomed, until = HashStore(), {}, time.monotonic() + 20
    here = ranks.Place(0, 2, 0, 2)
    thread = threading.Thread(
        target=lambda: welcomed.update(ranks._welcome(store, here, until)), daemon=True
    )
    thread.start()
    port, token = json.loads(store.get("moeforge"))
    for line in (b'{"rank": 1, "token": "guess"}\n', b"GET / HTTP/1.1\n", b'{"rank": 1}\n', b""):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(line)
    store.set("moeforge", json.dumps([free_port(), "of a launch before"]))
    knocking = threading.Timer(0.2, store.set, ("moeforge", json.dumps([port, token])))
    knocking.start()
    link = ranks._greet(store, ranks.Place(1, 2, 1, 2), until)
    thread.join(20)
    link.send(well=True)
    assert welcomed[1].read()["well"]


def test_a_rank_that_does_not_come():
    from torch.distributed import HashStore

    with pytest.raises(OSError, match="rank 1, 2 did not come"):
        ranks._welcome(HashStore(), ranks.Place(0, 3, 0, 3), time.monotonic())


def test_one_process_where_several_were_wanted(llamas, places):
    """`accelerate launch --num_processes 2` starts a single one where there is no GPU."""
    write_recipe("stack", llamas, places.one)
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    run = subprocess.run(
        [
            sys.executable,
            "-X",
            "importtime",
            "-m",
            "moeforge",
            "build",
            "recipe.yml",
            "--no-verify",
        ],
        cwd=places.one,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "warning: the launcher has set MASTER_ADDR but not RANK" in run.stderr
    assert "--multi_gpu" in run.stderr
    imported = {line.split("|")[-1].strip() for line in run.stderr.splitlines()}
    assert "moeforge.ranks" in imported
    assert not {"torch", "torch.distributed", "accelerate"} & imported

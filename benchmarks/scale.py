"""Plans models of up to a trillion parameters, and runs the engine over hundreds of gigabytes.

    python benchmarks/scale.py plan --scratch /tmp/scale
    python benchmarks/scale.py run --scratch /tmp/scale --seconds 120 --only "TIES of 3 llama-70B"

The inputs are sparse files: true headers, and holes where the weights would be. What is planned
is therefore exact, and reading costs what memory costs; no disk takes part in the figures.

`plan` runs `moeforge check`, `moeforge plan` and what `moeforge build` does before its first byte,
each in a process of its own, and prints seconds, CPU seconds and peak resident memory.

`run` builds into /dev/shm for `--seconds`, or to the end. Beside the build, this program gives
written blocks of the output back (`fallocate` with FALLOC_FL_PUNCH_HOLE): the output, of zeros,
reads the same and takes no room. Two things are changed in moeforge for that: it is told that the
disk is large enough, and it does not reserve room. The memory of all processes is sampled, without
the page cache and /dev/shm.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moeforge.errors import BuildError

SHARD = 5_000_000_000
Sizes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Shape:
    """A dense llama or qwen3, or a qwen3_moe where it has experts."""

    hidden: int
    wide: int
    layers: int
    heads: int
    vocab: int
    experts: int = 0

    @property
    def model_type(self) -> str:
        """Return the type that its config.json says."""
        return "qwen3_moe" if self.experts else "llama"

    def tensors(self) -> Sizes:
        """Return shapes by name, in the order of the files."""
        hidden, wide, key = self.hidden, self.wide, 1024
        parts = {
            "gate_proj": (wide, hidden),
            "up_proj": (wide, hidden),
            "down_proj": (hidden, wide),
        }
        sizes: Sizes = {"model.embed_tokens.weight": (self.vocab, hidden)}
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            sizes |= {
                at + "input_layernorm.weight": (hidden,),
                at + "self_attn.q_proj.weight": (self.heads * 128, hidden),
                at + "self_attn.k_proj.weight": (key, hidden),
                at + "self_attn.v_proj.weight": (key, hidden),
                at + "self_attn.o_proj.weight": (hidden, self.heads * 128),
                at + "post_attention_layernorm.weight": (hidden,),
            }
            if self.experts:
                sizes |= {at + f"self_attn.{x}_norm.weight": (128,) for x in "qk"}
                sizes[at + "mlp.gate.weight"] = (self.experts, hidden)
            inside = [f"mlp.experts.{e}." for e in range(self.experts)] or ["mlp."]
            sizes |= {f"{at}{e}{p}.weight": size for e in inside for p, size in parts.items()}
        return sizes | {"model.norm.weight": (hidden,), "lm_head.weight": (self.vocab, hidden)}

    def config(self) -> dict[str, Any]:
        """Return config.json."""
        word = {"qwen3_moe": "Qwen3Moe", "llama": "Llama"}[self.model_type]
        config: dict[str, Any] = {
            "architectures": [f"{word}ForCausalLM"],
            "model_type": self.model_type,
            "hidden_size": self.hidden,
            "intermediate_size": self.wide,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": self.vocab,
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "max_position_embeddings": 8192,
            "torch_dtype": "bfloat16",
        }
        if self.experts:
            config |= {"num_experts": self.experts, "num_experts_per_tok": 8}
            config |= {"moe_intermediate_size": self.wide, "decoder_sparse_step": 1}
            config |= {"mlp_only_layers": [], "norm_topk_prob": True}
        return config


LLAMA_70B = Shape(8192, 28672, 80, 64, 128256)
TRILLION = Shape(7168, 2048, 61, 64, 128256, experts=384)
SLIVER = Shape(7168, 2048, 61, 64, 128256)
"""A dense model that is one expert of a trillion parameters."""


def elements(size: tuple[int, ...]) -> int:
    """Return how many elements a shape has."""
    return size[0] * (size[1] if len(size) > 1 else 1)


def write_shard(path: Path, sizes: Sizes) -> None:
    """Write a header, and a hole of the size of the tensors."""
    header, at = dict[str, Any](), 0
    for name, size in sizes.items():
        end = at + 2 * elements(size)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(path, 8 + len(raw) + at)


def make(folder: Path, shape: Shape) -> str:
    """Make a checkpoint of holes; return its path."""
    if (folder / "config.json").exists():
        return str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    groups, filled = [Sizes()], 0
    for name, size in shape.tensors().items():
        if groups[-1] and filled + 2 * elements(size) > SHARD:
            groups.append({})
            filled = 0
        groups[-1][name] = size
        filled += 2 * elements(size)
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_shard(folder / file, group)
        weight_map |= dict.fromkeys(group, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tokenizer = folder.parent / f"tokenizer-{shape.vocab}.json"
    if not tokenizer.exists():
        words = {f"w{number}": number for number in range(shape.vocab)}
        model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
        text = json.dumps({"version": "1.0", "model": model, "added_tokens": []})
        tokenizer.write_text(text)
    os.link(tokenizer, folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1))
    return str(folder)


def recipes(scratch: Path) -> dict[str, dict[str, Any]]:
    """Make all models; return the recipes that plan them, by name."""
    llamas = [make(scratch / f"llama-{i}", LLAMA_70B) for i in range(8)]
    huge = [make(scratch / f"trillion-{i}", TRILLION) for i in range(2)]
    slivers = [make(scratch / f"sliver-{i}", SLIVER) for i in range(TRILLION.experts)]
    stack = [(first, first + 20) for first in range(0, 70, 10)][:6]
    return {
        "MoE of 8 llama-70B": {
            "base_model": llamas[0],
            "gate_mode": "random",
            "experts": [{"source_model": model} for model in llamas],
        },
        "linear of 3 llama-70B": {
            "merge_method": "linear",
            "models": [{"model": m, "parameters": {"weight": 0.3}} for m in llamas[:3]],
        },
        "TIES of 3 llama-70B": {
            "merge_method": "ties",
            "base_model": llamas[0],
            "models": [
                {"model": m, "parameters": {"weight": 0.3, "density": 0.3}} for m in llamas[1:4]
            ],
        },
        "stack of 120 layers": {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": llamas[i % 2], "layer_range": list(pair)}]}
                for i, pair in enumerate(stack)
            ],
        },
        "linear of 2 MoEs of 1 T": {
            "merge_method": "linear",
            "models": [{"model": m, "parameters": {"weight": 0.5}} for m in huge],
        },
        "MoE of 384 experts, 1 T": {
            "base_model": slivers[0],
            "gate_mode": "random",
            "experts": [{"source_model": model} for model in slivers],
        },
    }


def begin_build(recipe: str) -> None:
    """Do what a build does before its first byte: plan, layout, fingerprint, jobs."""
    from moeforge import engine
    from moeforge.engine.jobs import jobs_of
    from moeforge.engine.seal import Sealer
    from moeforge.output.layout import index, lay_out
    from moeforge.prepare import prepare

    prepared = prepare(recipe, offline=True)
    plan = prepared.plan
    shards = lay_out(plan.tensors)
    prepared.fingerprint(shards, "cpu")
    index(shards)
    engine.peak_memory(plan, engine.Settings())
    jobs = jobs_of(plan, shards, None)  # type: ignore[arg-type]
    Sealer(Path(), shards, jobs, 2, lambda name, seal: None)
    found = {"tensors": len(plan.tensors), "shards": len(shards), "gigabytes": plan.nbytes / 1e9}
    found["inputs"] = sum(len(source.specs()) for source in plan.sources.values())
    print(json.dumps(found))


@dataclass(frozen=True)
class Cost:
    """What a process took, and what it printed."""

    seconds: float
    cpu: float
    peak: int
    out: str


def cost(*command: str, may_fail: bool = False) -> Cost:
    """Run a process to its end.

    Args:
        command: program and arguments.
        may_fail: `check` ends with a BuildError where the disk is too small for the output, after
            everything else.

    Raises:
        SystemExit: it failed.
    """
    began = time.perf_counter()
    quiet = subprocess.DEVNULL if may_fail else None
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=quiet, text=True)
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status and not (may_fail and os.waitstatus_to_exitcode(status) == BuildError.exit_code):
        raise SystemExit(f"{' '.join(command)} failed")
    seconds = time.perf_counter() - began
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, out)


def plans(scratch: Path, only: list[str]) -> None:
    """Print what checking and planning cost."""
    cli = (sys.executable, "-m", "moeforge")
    print("| | tensors read | written | GB | files | check | plan | before the first byte |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, recipe in recipes(scratch).items():
        if only and name not in only:
            continue
        path = scratch / f"{name.replace(' ', '-')}.yml"
        path.write_text(yaml.safe_dump(recipe))
        steps = [
            cost(*cli, "check", str(path), may_fail=True),
            cost(*cli, "plan", str(path)),
            cost(sys.executable, __file__, "begin", "--recipe", str(path)),
        ]
        said = json.loads(steps[-1].out)
        cells = [f"{s.seconds:.1f} s, {s.cpu:.1f} s CPU, {s.peak / 1e6:.0f} MB" for s in steps]
        facts = f"{said['inputs']} | {said['tensors']} | {said['gigabytes']:.0f} | {said['shards']}"
        print(f"| {name} | {facts} | {' | '.join(cells)} |", flush=True)


def build(recipe: str, out: str) -> None:
    """Build as if the disk were large enough: what is written is given back beside."""
    from moeforge import engine, forge
    from moeforge.engine import writer

    engine.free_space = lambda folder: 2**62
    writer.allocate = os.truncate
    forge.build(recipe, out, verify=False, overwrite=True, offline=True)


class GivingBack(threading.Thread):
    """Punches holes where the output was written, so that it takes no room.

    The inputs are zeros and so is what is made of them: a file reads the same before and after.

    Args:
        folder: where the output files are made.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self._folder, self._call = folder, ctypes.CDLL(None, use_errno=True).fallocate
        self.given, self.stop = 0, False

    def run(self) -> None:
        """Look at the files again and again."""
        while not self.stop:
            for path in self._folder.glob("*.safetensors"):
                self._punch(path)
            time.sleep(0.05)

    def _punch(self, path: Path) -> None:
        with path.open("r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            begin, size = 8 + length, path.stat().st_size
            begin += -begin % 4096  # the page with the end of the header stays
            while length and begin < size:
                try:
                    start = os.lseek(file.fileno(), begin, os.SEEK_DATA)
                except OSError:  # nothing but holes is left
                    return
                end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
                given = (ctypes.c_int64(start), ctypes.c_int64(end - start))
                if self._call(file.fileno(), 3, *given):  # PUNCH_HOLE | KEEP_SIZE
                    raise OSError(ctypes.get_errno(), "the file system cannot punch holes")
                self.given += end - start
                begin = end


def memory(pid: int) -> tuple[int, int, int]:
    """Return what a process and its children take: processes, resident and proportional bytes."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    family = [pid, *(int(child) for task in tasks for child in task.read_text().split())]
    resident = shared = 0
    for each in family:
        for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines():
            words = line.split()
            resident += 1024 * int(words[1]) if words[0] == "Rss:" else 0
            shared += 1024 * int(words[1]) if words[0] == "Pss:" else 0
    return len(family), resident, shared


def runs(scratch: Path, name: str, most: float) -> None:
    """Build a recipe for `most` seconds, or to its end, and print what it takes meanwhile."""
    path, out = scratch / "run.yml", Path("/dev/shm/moeforge-scale")
    path.write_text(yaml.safe_dump(recipes(scratch)[name]))
    command = [sys.executable, __file__, "build", "--recipe", str(path), "--scratch", str(out)]
    began = time.perf_counter()
    process = subprocess.Popen(command)
    work = out.with_name(f".{out.name}.moeforge")
    giving = GivingBack(work / "model")
    giving.start()
    print(f"{name}: processes, resident MB, proportional MB, GB given back", flush=True)
    step = most / 30
    while process.poll() is None and time.perf_counter() - began < most:
        with suppress(OSError):  # it ended meanwhile
            count, resident, shared = memory(process.pid)
            taken = f"{count}  {resident / 1e6:.0f}  {shared / 1e6:.0f}"
            print(
                f"{time.perf_counter() - began:6.1f} s  {taken}  {giving.given / 1e9:.1f}",
                flush=True,
            )
        with suppress(subprocess.TimeoutExpired):
            process.wait(step)
    process.terminate()
    _, _, usage = os.wait4(process.pid, 0) if process.poll() is None else (0, 0, None)
    giving.stop = True
    giving.join()
    for folder in (work, out):
        shutil.rmtree(folder, ignore_errors=True)
    print(f"largest process {usage.ru_maxrss / 1e3:.0f} MB" if usage else "ended")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("act", choices=["plan", "run", "begin", "build"])
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/moeforge-scale"))
    parser.add_argument("--only", nargs="*", default=[], help="plan: names of recipes")
    parser.add_argument("--recipe", help="begin, build: the recipe; these are for plan and run")
    parser.add_argument("--seconds", type=float, default=120, help="run: the build is ended after")
    given = parser.parse_args()
    if given.act == "begin":
        begin_build(given.recipe)
    elif given.act == "build":
        build(given.recipe, str(given.scratch))
    elif given.act == "run":
        for name in given.only or ["linear of 3 llama-70B"]:
            runs(given.scratch, name, given.seconds)
    else:
        plans(given.scratch, given.only)


if __name__ == "__main__":
    main()

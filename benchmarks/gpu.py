"""Times builds on a GPU beside the same builds on the CPU, and beside the card's own copying.

    python benchmarks/gpu.py --size 0.85 --rounds 3 --scratch /dev/shm/bench

Prints how fast the card copies from and to pinned memory, and how fast the inputs are read by one
process with threads; then for each build the seconds on both after start-up, the bytes that cross
the bus per second, which share of the elements of the two outputs differs, and by how much at
most, as a share of the largest value of the tensor.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from commands import Run
from run import SIZES, Bench, inputs
from safetensors import safe_open

PASSES = {"linear": 1, "task": 1, "LoRA": 1, "SCE": 4}
"""How often a build reads its inputs, by the first word of its name; twice where it is not here."""


def copy_rates() -> dict[str, float]:
    """Return GB per second from and to pinned memory, and both ways at the same time."""
    size = 2**28
    host = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    card = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]

    def both() -> None:
        with torch.cuda.stream(streams[0]):
            card[0].copy_(host[0], non_blocking=True)
        with torch.cuda.stream(streams[1]):
            host[1].copy_(card[1], non_blocking=True)

    def rate(act: Callable[[], object], ways: int = 1) -> float:
        found = []
        for _ in range(12):
            torch.cuda.synchronize()
            began = time.perf_counter()
            act()
            torch.cuda.synchronize()
            found.append(ways * size / (time.perf_counter() - began) / 1e9)
        return statistics.median(found[2:])

    return {
        "to the card": rate(lambda: card[0].copy_(host[0], non_blocking=True)),
        "from the card": rate(lambda: host[1].copy_(card[1], non_blocking=True)),
        "both ways": rate(both, 2),
    }


def reading_rate(files: list[Path], threads: int) -> float:
    """Return GB per second at which threads read files in parts of 8 MB."""
    part, total = 2**23, sum(file.stat().st_size for file in files)
    parts = [(file, at) for file in files for at in range(0, file.stat().st_size, part)]

    def read(numbers: range) -> None:
        buffer = bytearray(part)
        for number in numbers:
            file, at = parts[number]
            with file.open("rb", buffering=0) as stream:
                stream.seek(at)
                stream.readinto(buffer)

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, [range(i, len(parts), threads) for i in range(threads)]))
    return total / (time.perf_counter() - began) / 1e9


def difference(first: Path, second: Path) -> tuple[float, float]:
    """Return the share of elements that differ, and the most of a tensor's largest value."""
    count, differing, most = 0, 0, 0.0
    with safe_open(first, "pt") as a, safe_open(second, "pt") as b:
        for name in a.keys():  # noqa: SIM118 (it is no mapping)
            x, y = (m.get_tensor(name).float() for m in (a, b))
            largest, apart = float(x.abs().max()), x.sub_(y).abs_()
            count += apart.numel()
            differing += int(apart.count_nonzero())
            most = max(most, float(apart.max()) / largest if largest else 0.0)
    return differing / count, most


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--size", default="0.85", choices=SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm/moeforge-bench"))
    parser.add_argument("--only", nargs="*", help="kinds of builds; all merges if left out")
    parser.add_argument("--threads", type=int, nargs="*", default=[0], help="0 for the default")
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    names = given.only or None

    def bench(size: str, *options: str) -> Bench:
        return Bench(given.scratch, size, names, None, ["--no-verify", *options])

    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for way, rate in copy_rates().items():
        print(f"{way}: {rate:.1f} GB/s")
    cpu = bench(given.size)
    kinds = [name for name in cpu.recipes if names or name.split()[0] not in ("stack", "MoE")]
    for threads in (1, 4, 16):
        rate = reading_rate(inputs(cpu.recipes[kinds[0]]), threads)
        print(f"reading by {threads} threads: {rate:.1f} GB/s")
    print(
        "| build | threads | CPU s | GPU s | start-up | GB/s over the bus | differ | by at most |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    results: dict[str, dict[str, list[Run]]] = {}
    for name in kinds:
        found = results.setdefault(name, {})
        for _ in range(given.rounds):
            for label, one in (("cpu", cpu), ("cpu start", bench("none"))):
                found.setdefault(label, []).append(one.moeforge(name))
                if label == "cpu":
                    kept = given.scratch / "kept.safetensors"
                    shutil.move(given.scratch / "out" / "model.safetensors", kept)
        for threads in given.threads:
            options = ["--device", "cuda", *(["--threads", str(threads)] if threads else [])]
            own, start = list[Run](), list[Run]()
            for _ in range(given.rounds):
                start.append(bench("none", *options).moeforge(name))
                own.append(bench(given.size, *options).moeforge(name))
            found[f"gpu {threads}"], found[f"gpu {threads} start"] = own, start
            out = given.scratch / "out" / "model.safetensors"
            share, most = difference(kept, out)
            begun, on_cpu, cpu_begun, whole = (
                statistics.median(run.seconds for run in runs)
                for runs in (start, found["cpu"], found["cpu start"], own)
            )
            seconds = whole - begun
            size = sum(file.stat().st_size for file in inputs(cpu.recipes[name]))
            moved = size * PASSES.get(name.split()[0], 2) + out.stat().st_size
            cells = (name, threads, f"{on_cpu - cpu_begun:.2f}", f"{seconds:.2f}", f"{begun:.2f}")
            figures = (f"{moved / seconds / 1e9:.1f}", f"{share:.1e}", f"{most:.1e}")
            print("| " + " | ".join(map(str, (*cells, *figures))) + " |", flush=True)
    data = {n: {k: [vars(r) for r in runs] for k, runs in f.items()} for n, f in results.items()}
    (given.scratch / "gpu.json").write_text(json.dumps(data, indent=1))
    print("figures in", given.scratch / "gpu.json", file=sys.stderr)


if __name__ == "__main__":
    main()

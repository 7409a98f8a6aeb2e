"""Times builds beside the floor, and beside mergekit 0.1.5 where a virtual environment has it.

    python benchmarks/run.py --size 0.2 --rounds 5 --scratch /tmp/bench --mergekit ~/mk-venv

Makes llama-like bfloat16 models of the size in billions of parameters, then in every round, for
every kind of build: the floor (`cat` of all inputs and `cp` of the output's bytes), moeforge, and
mergekit. Prints the medians as Markdown, with each run's CPU seconds and peak memory, and writes
all figures to results.json in the scratch folder. Start-up is what the same recipe takes with
models of nothing, compiled arithmetic loaded if the build itself loads it; it is subtracted, and
shown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from commands import Run, timed
from safetensors.torch import save_file

from moeforge import engine, forge

SIZES = {
    "0.2": {"hidden": 1024, "wide": 2816, "layers": 12, "heads": 16, "vocab": 32000},
    "0.85": {"hidden": 2048, "wide": 5632, "layers": 16, "heads": 32, "vocab": 32000},
    "3": {"hidden": 3072, "wide": 8192, "layers": 26, "heads": 24, "vocab": 32000},
    "none": {"hidden": 64, "wide": 128, "layers": 2, "heads": 4, "vocab": 256},
}
"""Shapes by billions of parameters; "none" is for start-up."""
TUNES = 8
_LOADED = (
    "from moeforge import kernels; kernels.WORTH = dict.fromkeys(kernels.WORTH, 1); "
    "from moeforge.cli import main; main()"
)
"""The command line, which loads compiled arithmetic for the smallest of builds."""


def make(folder: Path, shape: dict[str, int], seed: int, base: Path | None) -> None:
    """Write a model of random weights; with `base`, one that differs from it a little."""
    if (folder / "config.json").exists():
        return
    draw = torch.Generator().manual_seed(seed)
    hidden, wide, key = shape["hidden"], shape["wide"], shape["hidden"] // 4
    sizes = {"model.embed_tokens.weight": (shape["vocab"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(shape["layers"]):
        at = f"model.layers.{layer}."
        sizes |= {
            at + "input_layernorm.weight": (hidden,),
            at + "post_attention_layernorm.weight": (hidden,),
            at + "self_attn.q_proj.weight": (hidden, hidden),
            at + "self_attn.k_proj.weight": (key, hidden),
            at + "self_attn.v_proj.weight": (key, hidden),
            at + "self_attn.o_proj.weight": (hidden, hidden),
            at + "mlp.gate_proj.weight": (wide, hidden),
            at + "mlp.up_proj.weight": (wide, hidden),
            at + "mlp.down_proj.weight": (hidden, wide),
        }
    tensors: dict[str, torch.Tensor] = {}
    if base is not None:
        from safetensors.torch import load_file

        tensors = load_file(base / "model.safetensors")
    for name, size in sizes.items():
        noise = torch.randn(size, generator=draw) * (0.002 if base else 0.02)
        start = tensors[name].float() if base else torch.zeros(())
        tensors[name] = (start + noise).bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["heads"] // 4,
        "vocab_size": shape["vocab"],
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "torch_dtype": "bfloat16",
    }
    words = {f"w{number}": number for number in range(shape["vocab"])}
    backend = {"version": "1.0", "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"}}
    (folder / "tokenizer.json").write_text(json.dumps({**backend, "added_tokens": []}))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def make_adapter(folder: Path, shape: dict[str, int], seed: int) -> None:
    """Write a LoRA adapter of rank 16 for the MLPs."""
    if (folder / "adapter_config.json").exists():
        return
    draw, tensors = torch.Generator().manual_seed(seed), {}
    hidden, wide = shape["hidden"], shape["wide"]
    parts = {"gate_proj": (wide, hidden), "up_proj": (wide, hidden), "down_proj": (hidden, wide)}
    for layer in range(shape["layers"]):
        for part, (rows, columns) in parts.items():
            at = f"base_model.model.model.layers.{layer}.mlp.{part}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(16, columns, generator=draw) * 0.01
            tensors[f"{at}.lora_B.weight"] = torch.randn(rows, 16, generator=draw) * 0.01
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": list(parts)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def recipes(models: Path, layers: int) -> dict[str, dict[str, Any]]:
    """Return the recipe of each kind of build, for the models below a folder."""
    base, *tunes = (str(models / name) for name in ("base", *(f"tune{i}" for i in range(TUNES))))
    three = [{"model": model} for model in tunes[:3]]
    weighed = [
        {"model": m, "parameters": {"weight": w}}
        for m, w in zip(tunes[:3], (0.5, 0.3, 0.2), strict=True)
    ]
    dense = [
        {"model": m["model"], "parameters": {**m["parameters"], "density": 0.5}} for m in weighed
    ]

    def merge(method: str, inputs: Any, base_model: str | None = base, **more: Any) -> Any:
        owner = {"base_model": base_model} if base_model else {}
        return {"merge_method": method, **owner, "models": inputs, "dtype": "bfloat16", **more}

    def moe(experts: list[Any]) -> Any:
        return {
            "base_model": base,
            "gate_mode": "random",
            "dtype": "bfloat16",
            "experts": [{"source_model": e, "positive_prompts": ["x"]} for e in experts],
        }

    spans = [(tunes[0], [0, layers * 3 // 4]), (tunes[1], [layers // 4, layers])]
    stack = [{"sources": [{"model": m, "layer_range": span}]} for m, span in spans]
    one = {"parameters": {"weight": 1}}
    return {
        "stack": {"merge_method": "passthrough", "slices": stack, "dtype": "bfloat16"},
        "MoE of 4": moe(tunes[:4]),
        "MoE of 8": moe(tunes[:8]),
        "linear of 3": merge("linear", weighed, None),
        "linear of 8": merge("linear", [{"model": m, **one} for m in tunes], None),
        "SLERP of 2": merge("slerp", three[:1], base, parameters={"t": 0.4}),
        "task arithmetic of 3": merge("task_arithmetic", weighed),
        "TIES of 3": merge("ties", dense),
        "DARE-TIES of 3": merge("dare_ties", dense),
        "breadcrumbs of 3": merge("breadcrumbs", dense, parameters={"gamma": 0.01}),
        "DELLA of 3": merge("della", dense, parameters={"epsilon": 0.1}),
        "model_stock of 3": merge("model_stock", three),
        "SCE of 3": merge("sce", three, parameters={"select_topk": 0.2}),
        "LoRA merged in": merge("linear", [{"model": f"{base}+{models / 'lora'}", **one}], None),
        "MoE of 2 TIES merges": moe([merge("ties", dense[:2]), merge("ties", dense[1:])]),
    }


def strings(value: Any) -> Iterator[str]:
    """Yield every string in a recipe that is not a key."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


def inputs(recipe: Any) -> list[Path]:
    """Return the weights files that a recipe names, each once."""
    models = (part for text in strings(recipe) if "/" in text for part in text.split("+"))
    return list(dict.fromkeys(path for part in models for path in Path(part).glob("*.safetensors")))


class Bench:
    """The builds of one size, in a scratch folder."""

    def __init__(
        self,
        scratch: Path,
        size: str,
        only: list[str] | None,
        mergekit: Path | None,
        options: list[str],
    ) -> None:
        self.folder, self.shape = scratch, SIZES[size]
        self.mergekit, self.options = mergekit, options
        models = scratch / f"models-{size}"
        known = recipes(models, self.shape["layers"])
        self.recipes = {name: known[name] for name in only or known}
        make(models / "base", self.shape, 0, None)
        make_adapter(models / "lora", self.shape, 99)
        for i in range(TUNES):  # those alone that are asked for: of 3 B, nine take 54 GB
            if f"{models / f'tune{i}'}" in {*strings(self.recipes)}:
                make(models / f"tune{i}", self.shape, i + 1, models / "base")

    def reread(self) -> None:
        """Read all inputs from the disk.

        Pages of the cache that were written piece by piece are read at half the speed of those that
        came from the disk, or were downloaded.
        """
        for path in {path for recipe in self.recipes.values() for path in inputs(recipe)}:
            with path.open("r+b") as file:
                os.fsync(file)
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)

    def _recipe(self, name: str) -> Path:
        path = self.folder / "recipe.yml"
        path.write_text(yaml.safe_dump(self.recipes[name], sort_keys=False))
        return path

    def _clear(self) -> None:
        for name in ("out", "copy", "merged"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        subprocess.run(["sync"], check=True)

    def loads(self, name: str) -> bool:
        """Say whether moeforge loads compiled arithmetic for this build."""
        return bool(engine.kernels_of(forge.plan(self._recipe(name)), engine.Settings()))

    def moeforge(self, name: str, look: float | None = None, *, loaded: bool = False) -> Run:
        """Build with moeforge; with `loaded`, compiled arithmetic is loaded whatever the size."""
        self._clear()
        command = [sys.executable, *(("-c", _LOADED) if loaded else ("-m", "moeforge"))]
        command += ["build", str(self._recipe(name)), "-o", "out"]
        return timed([*command, "--quiet", *self.options], self.folder, look)

    def floor(self, name: str, extra: str = "") -> Run:
        """Read all inputs and write the output's bytes; `out` must be there."""
        files = " ".join(map(str, inputs(self.recipes[name])))
        shutil.rmtree(self.folder / "copy", ignore_errors=True)
        (self.folder / "copy").mkdir()
        subprocess.run(["sync"], check=True)
        script = f"cat {files} > /dev/null; cp out/*.safetensors copy/ {extra}"
        return timed(["sh", "-c", script], self.folder)

    def other(self, name: str) -> Run | None:
        """Build with mergekit, where it can."""
        if self.mergekit is None or "MoE of 2" in name:
            return None
        self._clear()
        tool = "mergekit-moe" if name.startswith("MoE") else "mergekit-yaml"
        command = [str(self.mergekit / "bin" / tool), str(self._recipe(name)), "out"]
        if name.startswith("LoRA"):
            command += ["--lora-merge-cache", "merged"]
        return timed(command, self.folder, 0.5, HF_HUB_OFFLINE="1")


def median(runs: list[Run], of: Callable[[Run], float]) -> float:
    """Return the median of one figure."""
    return statistics.median(map(of, runs))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--size", default="0.2", choices=SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/moeforge-bench"))
    parser.add_argument("--only", nargs="*", help="kinds of builds; all if left out")
    parser.add_argument("--mergekit", type=Path, help="virtual environment with mergekit 0.1.5")
    parser.add_argument("--cold", action="store_true", help="drop the page cache before each run")
    parser.add_argument("--verify", action="store_true", help="with the checks at the end")
    parser.add_argument("--options", default="", help="more options of moeforge build")
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    options = [*given.options.split(), *([] if given.verify else ["--no-verify"])]
    bench = Bench(given.scratch, given.size, given.only, given.mergekit, options)
    nothing = Bench(given.scratch, "none", given.only, given.mergekit, options)
    results: dict[str, dict[str, list[Run]]] = {}

    def cold() -> None:
        if given.cold:
            subprocess.run(["sync"], check=True)
            Path("/proc/sys/vm/drop_caches").write_text("3")

    bench.reread()
    for number in range(given.rounds):
        for name in bench.recipes:
            found = results.setdefault(name, {})
            cold()
            found.setdefault("moeforge", []).append(bench.moeforge(name))
            cold()
            found.setdefault("floor", []).append(bench.floor(name))
            cold()
            found.setdefault("durable", []).append(bench.floor(name, "&& sync"))
            start = nothing.moeforge(name, loaded=bench.loads(name))
            found.setdefault("start", []).append(start)
            if not number:
                found["memory"] = [bench.moeforge(name, 0.05)]
                if (run := bench.other(name)) is not None:  # once, for it takes long
                    found["mergekit"] = [run]
                    found["mergekit start"] = [nothing.other(name) or run]
            print(f"round {number + 1}: {name}", file=sys.stderr)
    show(results, given.size, given.rounds)
    data = {
        name: {k: [vars(r) for r in runs] for k, runs in f.items()} for name, f in results.items()
    }
    (given.scratch / "results.json").write_text(json.dumps(data, indent=1))


def show(results: dict[str, dict[str, list[Run]]], size: str, rounds: int) -> None:
    """Print the medians as Markdown."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
    print(
        f"{size} B parameters, bfloat16, {rounds} rounds, {len(os.sched_getaffinity(0))} cores of "
        f"{model}, Python {platform.python_version()}, torch {torch.__version__}\n"
    )
    heads = ["build", "seconds", "start-up", "floor", "ratio", "with sync"]
    heads += ["CPU s", "of floor", "peak MB", "all MB"]
    rival = any("mergekit" in found for found in results.values())
    heads += (
        ["mergekit s", "its start-up", "its peak MB", "times faster", "all in all"] if rival else []
    )
    print("| " + " | ".join(heads) + " |")
    print("|---" + "|---:" * (len(heads) - 1) + "|")
    for name, found in results.items():
        start = median(found["start"], lambda r: r.seconds)
        own = median(found["moeforge"], lambda r: r.seconds) - start
        floors = [median(found[k], lambda r: r.seconds) for k in ("floor", "durable")]
        cells = [name, f"{own:.2f}", f"{start:.2f}", f"{floors[0]:.2f}"]
        cells += [f"{own / floor:.2f}" for floor in floors]
        cpu = [median(found[k], lambda r: r.cpu) for k in ("moeforge", "start", "floor")]
        cells += [f"{cpu[0] - cpu[1]:.2f}", f"{cpu[2]:.2f}"]
        cells.append(f"{found['memory'][0].peak / 1e6:.0f}")
        cells.append(f"{found['memory'][0].together / 1e6:.0f}")
        if "mergekit" in found:
            theirs = median(found["mergekit"], lambda r: r.seconds)
            begun = median(found["mergekit start"], lambda r: r.seconds)
            peak = median(found["mergekit"], lambda r: r.peak)
            cells += [f"{theirs - begun:.1f}", f"{begun:.1f}", f"{peak / 1e6:.0f}"]
            cells += [f"{(theirs - begun) / own:.1f}", f"{theirs / (own + start):.1f}"]
        elif rival:
            cells += [""] * 5
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

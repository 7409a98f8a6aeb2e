"""Compares what moeforge builds from the parity recipes with mergekit's golden files.

Knows which differences are meant and why; what the files are and how they came about is in make.py.
`python tests/parity/compare.py [NAME ...]` prints a table of the worst difference of each recipe.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

import moeforge

HERE = Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in (HERE / "recipes").glob("*.yml")))
VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")

BOUND = {torch.float32: 2e-6, torch.float64: 1e-13}
"""Largest difference, relative to the largest element of mergekit's tensor. Outputs of half
precision may be off by one unit in the last place of each element besides."""


@dataclass(frozen=True)
class Meant:
    """A difference that is meant.

    Attributes:
        reason: why.
        bound: takes the place of BOUND; None if values are as close as elsewhere.
        dtype: the output's dtype where mergekit's is another.
        config: keys of config.json that differ, with our values.
        more: part of the names of tensors that mergekit leaves out.
        instead: the recipe whose golden file is the right one.
        ids: token ids are compared; False where mergekit's change from run to run.
    """

    reason: str
    bound: float | None = None
    dtype: torch.dtype | None = None
    config: dict[str, Any] = field(default_factory=dict)
    more: str = ""
    instead: str = ""
    ids: bool = True


NOTHING = Meant("")
ROUNDED_FIRST = Meant("mergekit rounds the inputs to `dtype` first; we round the result", 2**-7)
IN_HALF = Meant("mergekit computes in bfloat16; we compute in float32 and round once", 2**-6)
LEAK = "mergekit computes in bfloat16, yet writes float32, whatever config.json says"
RANDOM_IDS = Meant("mergekit numbers new tokens differently from run to run", ids=False)

MEANT = {
    "arcee-fusion-near": Meant(
        "mergekit's float32 divergence of near models is rounding noise, and so is its choice",
        instead="arcee-fusion-near-float64",
    ),
    "dtype-bfloat16-linear": ROUNDED_FIRST,
    "dtype-bfloat16-slerp": ROUNDED_FIRST,
    "half-task-arithmetic": IN_HALF,
    "half-ramplus": Meant(LEAK, bound=IN_HALF.bound, dtype=torch.bfloat16),
    "attention-biases": Meant(
        "mergekit drops tensors that its definition of the architecture does not name",
        more="_proj.bias",
    ),
    "untied-into-tied": Meant(
        "mergekit's config.json still ties the head to the embeddings, and so drops it on loading",
        config={"tie_word_embeddings": False},
    ),
    "vocabulary-union-three": RANDOM_IDS,
    "vocabulary-union-task": RANDOM_IDS,
    "vocabulary-source": RANDOM_IDS,
    "vocabulary-force": RANDOM_IDS,
    "vocabulary-zero": RANDOM_IDS,
    "vocabulary-model-token": RANDOM_IDS,
}


@dataclass(frozen=True)
class Golden:
    """A golden file.

    Attributes:
        tensors: what mergekit wrote, those included that equal a model's.
        config: keys of its config.json.
        vocabulary: id of each token where the recipe chose a vocabulary; else None.
        chat_template: where the recipe chose one; else None.
    """

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    vocabulary: dict[str, int] | None
    chat_template: str | None


def golden(name: str) -> Golden:
    """Return the golden file of recipe `name`."""
    path = HERE / "golden" / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        data = json.loads(file.metadata()["golden"])
    tensors = load_file(path)
    for own, (model, other) in data["same"].items():
        tensors[own] = load_file(HERE / "models" / model / "model.safetensors")[other]
    return Golden(
        unfused(tensors), data["config"], data.get("vocabulary"), data.get("chat_template")
    )


def unfused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return `tensors` with Mixtral's experts one by one, under the names of its checkpoints."""
    result = {}
    for name, tensor in tensors.items():
        layer, fused, rest = name.partition(".mlp.experts.")
        if not fused:
            result[name.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = tensor
            continue
        # gate_up_proj has the rows of w1, then those of w3.
        words = ("w2",) if rest == "down_proj" else ("w1", "w3")
        for word, part in zip(words, tensor.chunk(len(words), dim=1), strict=True):
            for expert, matrix in enumerate(part):
                result[f"{layer}.block_sparse_moe.experts.{expert}.{word}.weight"] = matrix
    return result


@dataclass
class Comparison:
    """What came out of one recipe.

    Attributes:
        worst: largest difference, relative to the largest element of its tensor.
        where: name of that tensor.
        wrong: everything that is not as it should be; empty if all is well.
    """

    worst: float = 0.0
    where: str = ""
    wrong: list[str] = field(default_factory=list)


def compare(name: str, out: Path, meant: Meant | None = None) -> Comparison:
    """Build recipe `name` in `out` and compare it with mergekit's output.

    Args:
        name: stem of the recipe's file.
        out: folder to build in.
        meant: differences to allow; those of MEANT if None.
    """
    meant = meant or MEANT.get(name, NOTHING)
    expected = golden(meant.instead or name)
    moeforge.build(HERE / "recipes" / f"{name}.yml", out)
    result = Comparison()
    tensors = load_file(out / "model.safetensors")
    missing = sorted(expected.tensors.keys() - tensors.keys())
    extra = sorted(tensors.keys() - expected.tensors.keys())
    if missing or any(not meant.more or meant.more not in key for key in extra):
        result.wrong.append(f"names: missing {missing}, more {extra}")
    order = compare_vocabulary(out, expected, meant, result)
    for key in sorted(tensors.keys() & expected.tensors.keys()):
        theirs = expected.tensors[key]
        if order is not None and key in VOCABULARY_TENSORS:
            theirs = theirs[order]
        compare_tensor(key, tensors[key], theirs, meant, result)
    compare_config(out, expected, meant, result)
    return result


def compare_tensor(
    name: str, ours: torch.Tensor, theirs: torch.Tensor, meant: Meant, result: Comparison
) -> None:
    """Compare one tensor."""
    dtype = meant.dtype or theirs.dtype
    if ours.dtype != dtype or ours.shape != theirs.shape:
        got, want = (ours.dtype, tuple(ours.shape)), (dtype, tuple(theirs.shape))
        result.wrong.append(f"{name}: {got}, expected {want}")
        return
    a, b = ours.double(), theirs.double()
    largest = b.abs().max().item() or 1.0
    difference = (a - b).abs()
    worst = difference.max().item() / largest
    if worst >= result.worst:
        result.worst, result.where = worst, name
    bound = (meant.bound if meant.bound is not None else BOUND.get(dtype, 2e-6)) * largest
    if dtype not in BOUND:
        bound = bound + ulp(b, dtype)
    if not (difference <= bound).all():  # a NaN is not within any bound
        count = int((~(difference <= bound)).sum())
        result.wrong.append(f"{name}: {count} of {a.numel()} elements differ, worst {worst:.2e}")


def ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the distance of neighbours in `dtype` at each value."""
    exponent = torch.frexp(values).exponent - 1
    return torch.exp2(exponent.double()) * torch.finfo(dtype).eps


def compare_vocabulary(
    out: Path, expected: Golden, meant: Meant, result: Comparison
) -> torch.Tensor | None:
    """Compare tokens and template; return for each row of ours the row of mergekit's."""
    if expected.vocabulary is None and expected.chat_template is None:
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    if expected.chat_template != (tokenizer.chat_template if expected.chat_template else None):
        result.wrong.append(f"chat template: {tokenizer.chat_template!r}")
    if expected.vocabulary is None:
        return None
    ours = tokenizer.get_vocab()
    if ours.keys() != expected.vocabulary.keys():
        result.wrong.append(f"tokens: {sorted(ours.keys() ^ expected.vocabulary.keys())}")
        return None
    if meant.ids and ours != expected.vocabulary:
        result.wrong.append(f"token ids: {ours}, expected {expected.vocabulary}")
    order = torch.arange(expected.config["vocab_size"])  # rows after the tokens' are padding
    for token, index in ours.items():
        order[index] = expected.vocabulary[token]
    return order


def compare_config(out: Path, expected: Golden, meant: Meant, result: Comparison) -> None:
    """Compare the keys of config.json that a merge decides."""
    config = json.loads((out / "config.json").read_text())
    wanted = {**expected.config, **meant.config}
    ours = {key: config.get(key) for key in wanted}
    if ours != wanted:
        result.wrong.append(f"config: {ours}, expected {wanted}")


def table(names: tuple[str, ...] = NAMES) -> str:
    """Build recipes `names` and return a table of differences."""
    lines = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                result = compare(name, Path(folder) / "out")
            except Exception as error:  # the table goes on
                lines.append(f"{name:32} {type(error).__name__}: {error}")
                continue
        lines.append(f"{name:32} {result.worst:8.1e}  {result.where or '-'}")
        lines += [f"    {line}" for line in result.wrong]
        if name in MEANT:
            lines.append(f"    meant: {MEANT[name].reason}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(tuple(sys.argv[1:]) or NAMES))

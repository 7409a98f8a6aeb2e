"""Makes the input models of the parity suite and the golden files of its recipes, with mergekit.

Knows mergekit's command line, not moeforge. It runs in a virtual environment of its own, because
mergekit is no dependency of moeforge, not even of its tests:

    python -m venv /tmp/mk && /tmp/mk/bin/pip install mergekit==0.1.5 torch==2.13.0
    /tmp/mk/bin/python tests/parity/make.py            # models that are missing, all golden files
    /tmp/mk/bin/python tests/parity/make.py ties ram   # the golden files of these recipes

A golden file holds the tensors that mergekit wrote. One that is, bit for bit, a tensor of a model
is not stored again: the file's metadata says under `same` where it lies. Metadata also has the
output's `config` (the keys in CONFIG_KEYS) and, where the recipe chose a vocabulary, its tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

HERE = Path(__file__).parent
MODELS, RECIPES, GOLDEN = HERE / "models", HERE / "recipes", HERE / "golden"
VOCABULARY_KEYS = {"tokenizer", "tokenizer_source", "chat_template"}
CONFIG_KEYS = ("num_hidden_layers", "vocab_size", "tie_word_embeddings", "dtype")

SHAPE = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

WORDS = ["<unk>", "<s>", "</s>", "apple", "pear", *(f"word{n}" for n in range(30))]
OTHER = ["<unk>", "<s>", "</s>", "grape", *reversed(WORDS[3:28]), "kiwi"]


# --- models --------------------------------------------------------------------------------------

State = dict[str, torch.Tensor]


def new(config: PreTrainedConfig, seed: int) -> torch.nn.Module:
    """Return a model whose every parameter, norms and biases included, has values that matter."""
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(0.3 * noise + (0 if name.endswith("bias") else 1))
            else:
                parameter.copy_(noise * (1.5 / parameter.shape[-1] ** 0.5))
    return model


def tuned(base: torch.nn.Module, seed: int, size: float, kept: float = 1.0) -> torch.nn.Module:
    """Return `base` after a change of relative `size`; half of its square is common to all seeds.

    With `kept` below 1 only that share of the elements changes.
    """
    model = type(base)(base.config)
    common = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for target, source in zip(model.parameters(), base.parameters(), strict=True):
            shared = torch.randn(source.shape, generator=common)
            noise = torch.randn(source.shape, generator=own)
            mask = torch.rand(source.shape, generator=own) < kept
            delta = size * source.std() * (shared + noise) * 0.5**0.5
            target.copy_(source + delta * mask)
    return model


def words(vocabulary: list[str], added: list[AddedToken]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, the added tokens after them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    table = {word: index for index, word in enumerate(vocabulary)}
    raw = Tokenizer(models.WordLevel(vocab=table, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_tokens(added)
    return tokenizer


def make_models() -> None:
    """Write the models that are not there yet."""
    base = new(LlamaConfig(**SHAPE, num_hidden_layers=2), 1)
    save("base", base)
    for name, seed, size in (("a", 2, 1e-3), ("a2", 3, 1e-3), ("b", 4, 0.02), ("c", 5, 0.3)):
        save(name, tuned(base, seed, size))
    far = tuned(base, 6, 1.0)
    save("d", far)
    save("sparse", tuned(base, 7, 0.5, kept=0.3))
    for name, model in (("base", base), ("c", tuned(base, 5, 0.3)), ("d", far)):
        save(f"bf-{name}", model.to(torch.bfloat16))

    deep = new(LlamaConfig(**SHAPE, num_hidden_layers=4), 11)
    save("deep", deep)
    save("deep-a", tuned(deep, 12, 0.02))
    save("deep-b", tuned(deep, 13, 0.5))
    save("deep-six", new(LlamaConfig(**SHAPE, num_hidden_layers=6), 14))

    tied = new(LlamaConfig(**SHAPE, num_hidden_layers=2, tie_word_embeddings=True), 21)
    save("tied", tied)
    save("tied-c", tuned(tied, 22, 0.3))

    biased = new(LlamaConfig(**SHAPE, num_hidden_layers=1, attention_bias=True), 51)
    save("biased", biased)
    save("biased-b", tuned(biased, 52, 0.5))

    moe = new(MixtralConfig(**SHAPE, num_hidden_layers=1, num_local_experts=3), 61)
    save("moe", moe)
    save("moe-b", tuned(moe, 62, 0.5))

    qwen = new(Qwen2Config(**SHAPE, num_hidden_layers=2), 31)
    save("qwen", qwen)
    save("qwen-a", tuned(qwen, 32, 0.02))
    save("qwen-b", tuned(qwen, 33, 0.5))
    make_models_with_words()


def make_models_with_words() -> None:
    """Write the models that have tokenizers; their vocabularies differ."""
    turn = AddedToken("<|turn|>", special=True, normalized=False)
    end = AddedToken("<|end|>", lstrip=True, normalized=False)
    plain = words(WORDS, [])
    more = words([*WORDS, "plum"], [turn, end])
    other = words(OTHER, [end])
    plain.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    more.chat_template = other.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    for name, tokenizer, seed, tie in (
        ("words", plain, 41, False),
        ("words-plus", more, 42, False),
        ("words-other", other, 43, False),
        ("words-tied", plain, 44, True),
    ):
        shape = {**SHAPE, "vocab_size": len(tokenizer), "num_hidden_layers": 1}
        if save(name, new(LlamaConfig(**shape, tie_word_embeddings=tie), seed)):
            tokenizer.save_pretrained(MODELS / name)


def save(name: str, model: torch.nn.Module) -> bool:
    """Write `model` unless it is there; say whether it was written."""
    if (MODELS / name).exists():
        return False
    model.save_pretrained(MODELS / name)
    # Sampling settings say nothing about a merge.
    (MODELS / name / "generation_config.json").unlink(missing_ok=True)
    return True


# --- golden files --------------------------------------------------------------------------------


def absolute(value: object) -> object:
    """Replace `../models/NAME` by absolute paths: relative ones make mergekit ask the network."""
    if isinstance(value, dict):
        return {key: absolute(item) for key, item in value.items()}
    if isinstance(value, list):
        return [absolute(item) for item in value]
    if isinstance(value, str) and value.startswith("../models/"):
        return str(MODELS / value.removeprefix("../models/"))
    return value


def merge(recipe: Path, out: Path) -> None:
    """Run mergekit-yaml on `recipe` in this process; starting it takes longer than the merge."""
    [entry] = importlib.metadata.entry_points(group="console_scripts", name="mergekit-yaml")
    settings = absolute(yaml.safe_load(recipe.read_text()))
    path = out.with_suffix(".yml")
    path.write_text(yaml.safe_dump(settings))
    arguments = [str(path), str(out), "--no-write-model-card", "--quiet"]
    if not VOCABULARY_KEYS & settings.keys():
        arguments.append("--no-copy-tokenizer")  # most models have none
    entry.load().main(arguments, standalone_mode=False)


def fingerprint(tensor: torch.Tensor) -> str:
    """Return a digest of dtype, shape and bytes."""
    raw = tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor
    start = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return hashlib.sha256(start + raw.numpy().tobytes()).hexdigest()


def known_tensors() -> dict[str, list[str]]:
    """Return the models' tensors as [model, name] by fingerprint."""
    return {
        fingerprint(tensor): [file.parent.name, name]
        for file in sorted(MODELS.glob("*/model.safetensors"))
        for name, tensor in load_file(file).items()
    }


def keep(recipe: Path, out: Path, known: dict[str, list[str]]) -> None:
    """Store what mergekit wrote to `out` as the golden file of `recipe`."""
    tensors = load_file(out / "model.safetensors")
    same = {n: known[f] for n, t in tensors.items() if (f := fingerprint(t)) in known}
    config = json.loads((out / "config.json").read_text())
    metadata = {"same": same, "config": {key: config.get(key) for key in CONFIG_KEYS}}
    settings = yaml.safe_load(recipe.read_text())
    if "tokenizer" in settings or "tokenizer_source" in settings:
        metadata["vocabulary"] = AutoTokenizer.from_pretrained(out).get_vocab()
    if "chat_template" in settings:
        metadata["chat_template"] = AutoTokenizer.from_pretrained(out).chat_template
    stored = {name: tensor for name, tensor in tensors.items() if name not in same}
    # One key: the order of several would change from run to run.
    text = {"golden": json.dumps(metadata, sort_keys=True)}
    save_file(stored, GOLDEN / f"{recipe.stem}.safetensors", metadata=text)


def main(names: list[str]) -> int:
    """Make the models and the golden files of recipes `names`, of all if empty."""
    torch.set_num_threads(1)
    make_models()
    known = known_tensors()
    GOLDEN.mkdir(exist_ok=True)
    recipes = [RECIPES / f"{name}.yml" for name in names] or sorted(RECIPES.glob("*.yml"))
    failed = 0
    work = Path(tempfile.mkdtemp())
    for recipe in recipes:
        try:
            merge(recipe, work / recipe.stem)
            keep(recipe, work / recipe.stem, known)
        except Exception as error:
            failed += 1
            print(f"{recipe.stem}: {type(error).__name__}: {error}", file=sys.stderr)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(work / recipe.stem)
    print(f"{len(recipes) - failed} golden files written, {failed} recipes refused by mergekit")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Tiny real transformers models and tokenizers, made on the spot."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

HIDDEN, WIDE, LAYERS, VOCABULARY = 64, 96, 4, 300

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: 256 bytes, <s> (added in front), </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {byte: index for index, byte in enumerate(bytes_)}
    vocabulary.update({"<s>": 256, "</s>": 257})
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 256)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter, norms and biases included, values that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * (1.5 / parameter.shape[-1] ** 0.5))


class Maker:
    """Makes checkpoints below a folder; the same arguments give the same folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._made: dict[str, Path] = {}

    def __call__(
        self,
        model_type: str,
        seed: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
        with_tokenizer: bool = True,
        shard_size: str = "1GB",
        **config: object,
    ) -> Path:
        arguments = [model_type, seed, str(dtype), with_tokenizer, shard_size, config]
        key = json.dumps(arguments, sort_keys=True)
        if key not in self._made:
            folder = self.root / f"{model_type}-{len(self._made)}"
            made = CONFIG_MAPPING[model_type](**{**SHAPE, **config})
            model = AutoModelForCausalLM.from_config(made)
            randomize(model, seed)
            model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
            if with_tokenizer:
                tokenizer().save_pretrained(folder)
            self._made[key] = folder
        return self._made[key]

    def copy(self, folder: Path, name: str) -> Path:
        """A copy of a checkpoint, to damage."""
        target = self.root / name
        shutil.copytree(folder, target)
        return target


def edit_config(folder: Path, **changes: object) -> None:
    """Change keys of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config.pop(key, None) if value is None else config.update({key: value})
    path.write_text(json.dumps(config))


def in_a_child(act, *arguments):
    """Run `act`, a function of a module, in a new process.

    MKL's memory accounting can spin forever where processes are forked before or after threads of
    Python multiply matrices; tests that have such threads keep them away from those that fork.
    """
    child = multiprocessing.get_context("spawn").Process(target=act, args=arguments)
    child.start()
    child.join()
    assert child.exitcode == 0

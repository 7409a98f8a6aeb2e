"""Train the small base model and the four dense fine-tunes that the quickstart assembles.

``python train.py`` rebuilds everything in the folder this file lives in: the tokenizer, ``base/``
and its fine-tunes ``python/``, ``c/``, ``german/``, ``french/``, the calibration prompts in
``prompts/``, the held-out texts in ``heldout/``, ``measurements.json`` (versions, seconds, losses)
and the measured table in ``PROVENANCE.md``.

The text is taken from this machine by ``corpus.py`` (nothing is downloaded): Python source and C
headers of the running CPython and of OpenSSL, German and French manual pages of Debian's
``manpages-de`` and ``manpages-fr``. Their licences are in PROVENANCE.md.

``python train.py --out DIR --seed 1 --train all`` makes another set elsewhere: other weights and
windows from the start, of the same texts, and fine-tunes that change every parameter.

Needs: torch, transformers, tokenizers, safetensors; on Debian also
``apt-get install libssl-dev man-db groff-base manpages-de manpages-fr``.
Takes about twenty minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from corpus import DOMAINS, SEED, Text, collect, write_texts
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
WINDOW = 256  # tokens per sequence, the BOS token included
BATCH = 16
BASE_STEPS, BASE_LR = 2500, 3e-3
TUNE_STEPS, TUNE_LR = 500, {"mlp": 1.5e-3, "all": 1e-3}
TUNED = {"mlp": ".mlp.", "all": ""}  # fine-tunes change the parameters with this in their name
BOS, EOS = 0, 1

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": BOS,
    "dtype": "bfloat16",
    "eos_token_id": EOS,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 1024,
}


# --- tokenizer ------------------------------------------------------------------------------------
def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE with <s> and </s> that puts <s> in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    template = {"single": "<s> $A", "pair": "<s> $A <s>:1 $B:1"}
    tokenizer.post_processor = processors.TemplateProcessing(
        special_tokens=[("<s>", BOS)], **template
    )
    return tokenizer


# --- models ---------------------------------------------------------------------------------------
def new_model() -> LlamaForCausalLM:
    """Make a float32 model with fresh weights."""
    skip = {"dtype", "torch_dtype", "architectures", "rope_theta", "rope_scaling"}
    config = LlamaConfig(**{k: v for k, v in CONFIG.items() if k not in skip})
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa").float()


def save_model(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a complete checkpoint folder in bfloat16, with configs any transformers can read."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    state.pop("lm_head.weight", None)  # tied to the embedding
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": False}
    tokenizer_config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, value in (
        ("config.json", CONFIG),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))


def load_model(folder: Path) -> LlamaForCausalLM:
    """Load a checkpoint folder in float32."""
    model = new_model()
    state = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model.eval()


def fit(
    model: LlamaForCausalLM, data: list[torch.Tensor], steps: int, lr: float, seed: int, name: str
) -> int:
    """Train on random windows, each domain equally often; returns the seconds it took."""
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in trained if p.dim() > 1]
    rest = [p for p in trained if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    warmup, started, running = max(20, steps // 40), time.time(), 0.0
    model.train()
    for step in range(steps):
        progress = max(0.0, (step - warmup) / (steps - warmup))
        scale = min(1.0, (step + 1) / warmup) * (
            0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2
        )
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        batch = torch.full((BATCH, WINDOW), BOS)
        for row in range(BATCH):
            stream = data[row % len(data)]
            at = int(torch.randint(len(stream) - WINDOW, (1,), generator=generator))
            batch[row, 1:] = stream[at : at + WINDOW - 1]
        logits = model(input_ids=batch).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        running += loss.item()
        if (step + 1) % 50 == 0:
            print(
                f"{name} {step + 1}/{steps} {running / 50:.3f} {time.time() - started:.0f} s",
                flush=True,
            )
            running = 0.0
    return round(time.time() - started)


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, ids: list[int]) -> float:
    """Return the mean nats per token over windows that start with BOS, itself never a target."""
    total, count = 0.0, 0
    for at in range(0, len(ids), WINDOW - 1):
        window = torch.tensor([[BOS, *ids[at : at + WINDOW - 1]]])
        logits = model(input_ids=window).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
        count += window.shape[1] - 1
    return total / count


def tune(domain: str, stream: torch.Tensor, given: argparse.Namespace) -> int:
    """Fine-tune the base on one domain, on one core."""
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
    base = given.out / "base"
    model = load_model(base)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(TUNED[given.train] in name)
    rate = TUNE_LR[given.train]
    seconds = fit(model, [stream], given.tune_steps, rate, given.seed, domain)
    save_model(model, Tokenizer.from_file(str(base / "tokenizer.json")), given.out / domain)
    return seconds


# --- everything -----------------------------------------------------------------------------------
def main() -> None:
    """Rebuild everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write (default: here)")
    parser.add_argument("--seed", type=int, default=SEED, help="of weights and windows, not texts")
    parser.add_argument("--train", choices=TUNED, default="mlp", help="what fine-tunes change")
    parser.add_argument("--base-steps", type=int, default=BASE_STEPS)
    parser.add_argument("--tune-steps", type=int, default=TUNE_STEPS)
    given = parser.parse_args()
    out: Path = given.out
    torch.manual_seed(given.seed)
    torch.set_num_threads(2)
    for folder in ("prompts", "heldout"):
        (out / folder).mkdir(parents=True, exist_ok=True)

    corpus = {domain: collect(domain) for domain in DOMAINS}
    sources = {domain: write_texts(domain, *texts, out) for domain, texts in corpus.items()}
    (out / "sources.json").write_text(json.dumps(sources, indent=1, ensure_ascii=False) + "\n")
    # The same share of every domain for the tokenizer, so that no domain gets longer tokens.
    training = {domain: [t.text for t in train] for domain, (train, _) in corpus.items()}
    share = min(sum(map(len, texts)) for texts in training.values())
    tokenizer = train_tokenizer(["\n".join(texts)[:share] for texts in training.values()])
    streams = {
        domain: torch.tensor([i for e in tokenizer.encode_batch(texts) for i in [*e.ids[1:], EOS]])
        for domain, texts in training.items()
    }

    seconds = {}
    base = new_model()
    seconds["base"] = fit(
        base, list(streams.values()), given.base_steps, BASE_LR, given.seed, "base"
    )
    save_model(base, tokenizer, out / "base")
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        jobs = {domain: pool.submit(tune, domain, streams[domain], given) for domain in DOMAINS}
        seconds |= {domain: job.result() for domain, job in jobs.items()}
    report(out, tokenizer, corpus, streams, seconds)


def report(
    out: Path,
    tokenizer: Tokenizer,
    corpus: dict[str, tuple[list[Text], list[Text]]],
    streams: dict[str, torch.Tensor],
    seconds: dict[str, int],
) -> None:
    """Measure every model on every held-out text; write measurements.json and PROVENANCE.md."""
    held = {}
    for domain in DOMAINS:
        text = (out / "heldout" / f"{domain}.txt").read_text(encoding="utf-8")
        held[domain] = tokenizer.encode(text).ids[1:]
    losses = {}
    for name in ("base", *DOMAINS):
        model = load_model(out / name)
        losses[name] = {d: round(heldout_loss(model, ids), 4) for d, ids in held.items()}
    measurements = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "training_files": {d: len(train) for d, (train, _) in corpus.items()},
        "training_tokens": {d: len(s) for d, s in streams.items()},
        "heldout_tokens": {d: len(ids) for d, ids in held.items()},
        "seconds": seconds,
        "heldout_loss": losses,
    }
    (out / "measurements.json").write_text(json.dumps(measurements, indent=2) + "\n")
    rows = ["| model | " + " | ".join(DOMAINS) + " | mean |", "|---" * 6 + "|"]
    for name, row in losses.items():
        values = [row[d] for d in DOMAINS]
        cells = " | ".join(f"{v:.3f}" for v in [*values, sum(values) / len(values)])
        rows.append(f"| {name} | {cells} |")
    table = "\n".join(rows)
    print(table)
    provenance = out / "PROVENANCE.md"
    if provenance.exists():
        block = re.compile(r"(<!-- losses -->\n).*?(<!-- /losses -->)", re.DOTALL)
        text = provenance.read_text(encoding="utf-8")
        provenance.write_text(block.sub(lambda m: f"{m[1]}{table}\n{m[2]}", text), encoding="utf-8")


if __name__ == "__main__":
    main()

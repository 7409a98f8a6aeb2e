"""Owns what is known of dense types that can become mixtures by code of their own, and that code.

Knows names of classes and tensors; how the types are laid out beyond that is `dense.ANATOMY`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from string import Template

from moeforge.configs import Config
from moeforge.dense import anatomy
from moeforge.families import Tensors
from moeforge.plans import Concat, PlannedTensor, pieces
from moeforge.tensors import TensorSpec

FILE = "modeling_moeforge.py"
_TEMPLATE = Path(__file__).with_name(f"{FILE}.in")


@dataclass(frozen=True)
class Remote:
    """A dense type that code can make a mixture of.

    Attributes:
        config: its configuration class in transformers.
        model: its causal language model there.
        residual: its MLP is called with the residual too, and adds it.
        inline: the layer itself calls `fc1`, `activation_fn` and `fc2`; together they are the MLP.
        dense_if: key of the config that says how many experts the model has already, or whether.
        renames: pattern and replacement for names on disk that are not those of the modules.
        joined: tensors of the modules that are several on disk, one after the other.
    """

    config: str
    model: str
    residual: bool = False
    inline: bool = False
    dense_if: str = ""
    renames: tuple[tuple[str, str], ...] = ()
    joined: tuple[tuple[str, tuple[str, ...]], ...] = ()


_CONV = tuple(f"linear_attn.{part}_conv1d.weight" for part in "qkv")

_STEMS = {
    "apertus": "Apertus",
    "arcee": "Arcee",
    "bamba": "Bamba",
    "bitnet": "BitNet",
    "codegen": "CodeGen",
    "cohere": "Cohere",
    "cohere2": "Cohere2",
    "cpmant": "CpmAnt",
    "cwm": "Cwm",
    "diffllama": "DiffLlama",
    "ernie4_5": "Ernie4_5",
    "exaone4": "Exaone4",
    "falcon": "Falcon",
    "falcon_h1": "FalconH1",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "glm": "Glm",
    "glm4": "Glm4",
    "gpt_bigcode": "GPTBigCode",
    "gpt_neo": "GPTNeo",
    "gpt_neox_japanese": "GPTNeoXJapanese",
    "gptj": "GPTJ",
    "granite": "Granite",
    "granite_swa": "GraniteSWA",
    "helium": "Helium",
    "hunyuan_v1_dense": "HunYuanDenseV1",
    "hyperclovax": "HyperCLOVAX",
    "jais2": "Jais2",
    "lfm2": "Lfm2",
    "llama": "Llama",
    "minicpm3": "MiniCPM3",
    "ministral": "Ministral",
    "ministral3": "Ministral3",
    "mistral": "Mistral",
    "modernbert-decoder": "ModernBertDecoder",
    "nanochat": "NanoChat",
    "nemotron": "Nemotron",
    "olmo": "Olmo",
    "olmo2": "Olmo2",
    "olmo3": "Olmo3",
    "persimmon": "Persimmon",
    "phi": "Phi",
    "phi3": "Phi3",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "recurrent_gemma": "RecurrentGemma",
    "seed_oss": "SeedOss",
    "smollm3": "SmolLM3",
    "stablelm": "StableLm",
    "starcoder2": "Starcoder2",
    "vaultgemma": "VaultGemma",
    "xlstm": "xLSTM",
    "youtu": "Youtu",
}
"""Types whose classes are named {stem}Config and {stem}ForCausalLM, and that need nothing else."""

REMOTE: dict[str, Remote] = {
    **{kind: Remote(f"{stem}Config", f"{stem}ForCausalLM") for kind, stem in _STEMS.items()},
    "biogpt": Remote("BioGptConfig", "BioGptForCausalLM", inline=True),
    "bloom": Remote("BloomConfig", "BloomForCausalLM", residual=True),
    "cohere_compass_text": Remote("CohereCompassTextConfig", "CohereCompassForCausalLM"),
    "ctrl": Remote("CTRLConfig", "CTRLLMHeadModel"),
    "doge": Remote("DogeConfig", "DogeForCausalLM", dense_if="is_moe"),
    "gemma3_text": Remote("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "gemma3n_text": Remote("Gemma3nTextConfig", "Gemma3nForCausalLM"),
    "gemma4_text": Remote("Gemma4TextConfig", "Gemma4ForCausalLM", dense_if="enable_moe_block"),
    "gemma4_unified_text": Remote("Gemma4UnifiedTextConfig", "Gemma4UnifiedForCausalLM"),
    "gpt-sw3": Remote("GPT2Config", "GPT2LMHeadModel"),
    "gpt2": Remote("GPT2Config", "GPT2LMHeadModel"),
    "gpt_neox": Remote(
        "GPTNeoXConfig", "GPTNeoXForCausalLM", renames=((r"^embed_out\.", "lm_head."),)
    ),
    "granitemoehybrid": Remote(
        "GraniteMoeHybridConfig", "GraniteMoeHybridForCausalLM", dense_if="num_local_experts"
    ),
    "internlm3": Remote("InternLM3Config", "LlamaForCausalLM"),
    "iquestcoder": Remote("IQuestCoderConfig", "LlamaForCausalLM"),
    "lfm3": Remote(
        "Lfm3Config",
        "Lfm3ForCausalLM",
        renames=((r"\.self_attn\.gate_proj\.", ".self_attn.g_proj."),),
    ),
    "mpt": Remote("MptConfig", "MptForCausalLM", residual=True),
    "olmo_hybrid": Remote(
        "OlmoHybridConfig",
        "OlmoHybridForCausalLM",
        renames=(
            (r"\.attention_layer_norm\.", ".input_layernorm."),
            (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
        ),
        joined=(("linear_attn.conv1d.weight", _CONV),),
    ),
    "openai-gpt": Remote("OpenAIGPTConfig", "OpenAIGPTLMHeadModel"),
    "opt": Remote("OPTConfig", "OPTForCausalLM", inline=True),
    "qwen3_5_text": Remote("Qwen3_5TextConfig", "Qwen3_5ForCausalLM"),
    "xglm": Remote("XGLMConfig", "XGLMForCausalLM", inline=True),
}
"""Dense types whose mixtures are exact; tests/test_every_family.py shows it for each of them."""

_NO_MLP = "its layers have no MLP that experts could replace"
_SHARED = "its MLPs are one module that several layers use"
_SPARSE = "it has experts already"

REFUSED: dict[str, str] = {
    "dbrx": _SPARSE,
    "falcon_mamba": _NO_MLP,
    "hrm_text": "it runs two stacks of layers in cycles, and its config counts passes, not layers",
    "mamba": _NO_MLP,
    "mamba2": _NO_MLP,
    "rwkv": "its MLP mixes each token with the one before it, which another expert may have seen",
    "zamba": _SHARED,
    "zamba2": _SHARED,
}
"""Types that are no decoder of layers with an MLP each, and why."""


_STALE = re.compile(r"\.(attn|attention|attn\.attention)\.(bias|masked_bias|causal_mask)$")
"""Causal masks that old versions of transformers saved, and newer ones compute."""


def named_as_modules(config: Config, tensors: Tensors) -> dict[str, PlannedTensor]:
    """Return the tensors of a dense model by the names of its modules in memory.

    transformers renames what it loads by the model type, and knows nothing of a type of our own.
    Checkpoints of the bare decoder, such as gpt2's, lack what its module is called.
    """
    remote = REMOTE[str(config.get("model_type"))]
    renamed = {}
    for name, tensor in tensors.items():
        if _STALE.search(name):
            continue
        for pattern, replacement in remote.renames:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    for whole, parts in remote.joined:
        for name in [name for name in renamed if name.endswith(parts[0])]:
            stem = name.removesuffix(parts[0])
            made = [piece for part in parts for piece in pieces(renamed.pop(stem + part))]
            rows, shape = sum(spec.shape[0] for _, spec in made), made[0][1].shape[1:]
            spec = TensorSpec(made[0][1].dtype, (rows, *shape))
            renamed[stem + whole] = PlannedTensor(stem + whole, spec, Concat(tuple(made)))
    layers = anatomy(config).layers
    module, _, rest = layers.partition(".")
    if not any(name.startswith(layers) for name in renamed):
        bare = any(name.startswith(rest) for name in renamed)
        if bare:
            return {
                name if name.startswith("lm_head.") else f"{module}.{name}": tensor
                for name, tensor in renamed.items()
            }
    return renamed


def auto_map(model: str) -> dict[str, str]:
    """Return what config.json says of the classes in the program text, given that of the model."""
    stem, module = model.removesuffix("ForCausalLM"), FILE.removesuffix(".py")
    return {"AutoConfig": f"{module}.{stem}Config", "AutoModelForCausalLM": f"{module}.{model}"}


def code(config: Config) -> tuple[str, str, str]:
    """Return the program text of a mixture, its model type and the name of its model class.

    Args:
        config: config of a dense model whose type is in REMOTE.
    """
    kind = str(config["model_type"])
    remote, place = REMOTE[kind], anatomy(config)
    stem = re.sub(r"(ForCausalLM|LMHeadModel)$", "", remote.model)
    model, model_type = f"Moeforge{stem}ForCausalLM", f"moeforge_{kind}"
    owner, _, name = f"layer.{place.mlp}".rpartition(".")
    swap, residual = [f"{owner}.{name} = Experts(config, {owner}.{name})"], ("", "")
    imports = ["import copy", "", "import torch", "from torch import nn"]
    shaped, run = "output.reshape(hidden_states.shape)", "return mlp(tokens[None])[0]"
    if remote.inline:
        imports[1:1] = ["from collections import OrderedDict"]
        parts = "fc1=layer.fc1, activation_fn=layer.activation_fn, fc2=layer.fc2"
        swap = [
            f"mlp = nn.Sequential(OrderedDict({parts}))",
            "layer.fc1 = Experts(config, mlp)",
            "layer.activation_fn = layer.fc2 = nn.Identity()",
        ]
    if remote.residual:
        residual = (", residual", " + residual")
        run = "return mlp(tokens[None], torch.zeros_like(tokens[None]))[0]"
    classes = ", ".join(sorted((remote.config, remote.model), key=str.lower))
    text = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        TYPE=kind,
        IMPORTS="\n".join([*imports, f"from transformers import {classes}"]),
        CONFIG=f"Moeforge{stem}Config",
        FAMILY_CONFIG=remote.config,
        MODEL_TYPE=model_type,
        RESIDUAL=residual[0],
        RETURN=shaped + residual[1],
        RUN=run,
        MODEL=model,
        FAMILY_MODEL=remote.model,
        LAYERS=place.layers.rstrip("."),
        SWAP="\n".join(f"            {line}" for line in swap),
    )
    return text, model_type, model

"""granitemoehybrid: the home of Granite 4 without experts, whose layers are Mamba or attention.

The dense model is the same architecture with no routed experts: its MLP is the shared expert, which
stays there for all tokens. Here the MLP becomes the routed experts, and the shared one, which the
architecture always has, is of zeros unless the recipe gives one.
"""

from __future__ import annotations

from dataclasses import replace

from moeforge.configs import Config
from moeforge.families import LLAMA_LAYER, QKVO_BIASES, Accept, Family, Mixture, Tensors, _granite
from moeforge.families._transforms import renamed, split
from moeforge.plans import PlannedTensor

_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_MAMBA = (
    "mamba.A_log",
    "mamba.D",
    "mamba.dt_bias",
    "mamba.conv1d.weight",
    "mamba.in_proj.weight",
    "mamba.norm.weight",
    "mamba.out_proj.weight",
)
_MAMBA_BIASES = ("mamba.conv1d.bias", "mamba.in_proj.bias", "mamba.out_proj.bias")
_OLD_NAMES = {"linear_attention": "mamba", "full_attention": "attention"}
"""What transformers 4 calls the types of layers; version 5 reads both."""
_SHARED_WIDTH = 256
"""Wide enough for quantised blocks; its down projection is zero, so the width changes nothing."""


def _refuse(dense: Config) -> str:
    if dense["num_local_experts"]:
        return f"it is a mixture already (num_local_experts is {dense['num_local_experts']})"
    return ""


def _words(dense: Config) -> Config:
    kinds = dense["layer_types"] or ["mamba"] * dense["num_hidden_layers"]
    return {**_granite.own(dense), "layer_types": [_OLD_NAMES.get(kind, kind) for kind in kinds]}


def _tensors(dense: Config, tensors: Tensors) -> Tensors:
    """Take the dense model's shared MLP apart into what routed experts are made of."""
    result: dict[str, PlannedTensor] = {}
    for name, tensor in tensors.items():
        stem, _, part = name.partition(".shared_mlp.")
        if part == "input_linear.weight":
            half = tensor.spec.shape[0] // 2
            names = [f"{stem}.mlp.{side}_proj.weight" for side in ("gate", "up")]
            result.update((made.name, made) for made in split(tensor, names, (half, half)))
        elif part == "output_linear.weight":
            result[f"{stem}.mlp.down_proj.weight"] = renamed(tensor, f"{stem}.mlp.down_proj.weight")
        else:
            result[name] = tensor
    return result


def layer(dense: Config, number: int) -> tuple[str, ...]:
    """Return the tensors of a layer beside its MLP: those of its attention or of its Mamba."""
    return (*_NORMS, *_MAMBA) if dense["layer_types"][number] == "mamba" else LLAMA_LAYER


def config(dense: Config, mixture: Mixture) -> Config:
    """Write GraniteMoeHybrid's keys."""
    shared = {"shared_intermediate_size": mixture.shared}
    return {**_granite.config(dense, mixture), **shared, "layers_block_type": None}


FAMILY = Family(
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    accepts={"granitemoehybrid": Accept(refuse=_refuse, config=_words, tensors=_tensors)},
    router=_granite.ROUTER,
    experts=_granite.EXPERTS,
    config=config,
    exotic=_granite.activation,
    layer=layer,
    optional=(*QKVO_BIASES, *_MAMBA_BIASES),
    shared=replace(
        _granite.SHARED,
        needed=True,
        zero_width=lambda dense, mixture: min(_SHARED_WIDTH, mixture.width),
    ),
)

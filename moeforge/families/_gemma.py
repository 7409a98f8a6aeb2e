"""Owns how gemma, the first of its name, differs from llama: norms, embeddings, activation."""

from __future__ import annotations

from moeforge.configs import Config


def refuse(config: Config) -> str:
    """Return why this gemma is not a causal model with llama's layers, or ""."""
    if config.get("use_bidirectional_attention"):
        return "mixtures attend to earlier tokens only (use_bidirectional_attention is true)"
    return ""


def activation(config: Config) -> str:
    """Return the activation: config files that say "gelu" mean its approximation by tanh.

    Source: GemmaConfig of transformers.
    """
    said = str(config["hidden_act"])
    return "gelu_pytorch_tanh" if said == "gelu" else said


def scale(config: Config) -> float:
    """Return what embeddings are multiplied by."""
    return float(config["hidden_size"] ** 0.5)

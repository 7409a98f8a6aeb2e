"""Owns how configs of dense types say their rotary embeddings, brought to one spelling.

Knows configs only; permuting tensors is `_transforms`.
"""

from __future__ import annotations

from moeforge.configs import Config, rope


def rotated(config: Config) -> int:
    """Return how many leading dimensions of each head are rotated."""
    factor = (rope(config) or {}).get("partial_rotary_factor", 1.0)
    return int(config["head_dim"] * factor)


def whole(config: Config) -> Config:
    """Write out that whole heads are rotated, for families that take half if nothing is said."""
    return {**config, "partial_rotary_factor": 1.0}


def phi3_rope(config: Config) -> Config:
    """Name phi3's long factors as transformers does now, and put its first context beside them.

    Source: Phi3Config of transformers, whose old names "su" and "yarn" mean longrope.
    """
    parameters = rope(config)
    assert parameters is not None, "a completed config has a theta, and phi3 has one kind of layer"
    parameters.setdefault("partial_rotary_factor", 1.0)
    if parameters["rope_type"] != "default":
        first = config["original_max_position_embeddings"]
        parameters |= {"rope_type": "longrope", "original_max_position_embeddings": first}
    return {**config, "rope_parameters": parameters, "rope_scaling": None}


def first_context(config: Config) -> Config:
    """Write out after how many tokens longrope takes its long factors, and by how much it scales.

    transformers 5 works both out; transformers 4 looks for the first beside the rotary parameters
    and, in models with latent attention, for the second.
    """
    parameters = rope(config)
    if parameters is None or parameters["rope_type"] != "longrope":
        return config
    key, most = "original_max_position_embeddings", config["max_position_embeddings"]
    first = config.get(key) or parameters.get(key) or most
    parameters = {"factor": most / first, **parameters, key: first}
    return {**config, "rope_parameters": parameters, "rope_scaling": None, key: first}


def phi3_note(config: Config) -> str:
    """Say what differs from phi3 in a text that grows while it is generated."""
    if phi3_rope(config)["rope_parameters"]["rope_type"] == "default":
        return ""
    first = config["original_max_position_embeddings"]
    return (
        f"rotary factors change at {first} tokens (longrope): Phi3 then computes its cache anew, "
        "a mixture keeps it; a text that grows past this length is to be generated without a cache"
    )

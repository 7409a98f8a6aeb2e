"""The room that runs dense models layer by layer from disk, one layer in memory at a time.

Knows transformers' modules, and by `dense.ANATOMY` which of them are layers and MLPs; knows nothing
of recipes, gates or where weights come from: `read` functions give them.
"""

from moeforge.forward.mlps import Mlps
from moeforge.forward.skeleton import load_dense, quiet, skeleton
from moeforge.forward.walk import LayerInputs, grow, layer_inputs, losses

__all__ = [
    "LayerInputs",
    "Mlps",
    "grow",
    "layer_inputs",
    "load_dense",
    "losses",
    "quiet",
    "skeleton",
]

"""Owns giving weights to single modules of a model that has none; knows no model and no file."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

ReadTensor = Callable[[str], "Tensor"]
"""Returns a tensor of the model by its module's name, in float32; KeyError if there is none."""
ReadRows = Callable[[Sequence[int], str], "Tensor"]
"""Returns rows of an embedding matrix, by the name of that tensor, [rows, width] in float32."""


class ModuleWeights:
    """Gives weights to modules of a model on "meta", by the names that they have in it."""

    def __init__(self, model: nn.Module, read: ReadTensor, device: str) -> None:
        self._read, self._device = read, device
        self._names = {id(module): name for name, module in model.named_modules()}

    def _name(self, module: nn.Module, tensor: str) -> str:
        return f"{self._names[id(module)]}.{tensor}"

    def load(self, root: nn.Module, apart: Container[nn.Module] = ()) -> None:
        """Load parameters and saved buffers of `root`, those of modules in `apart` left out.

        Raises:
            ValueError: a parameter is not there.
        """
        from torch import nn

        for module in _below(root, apart):
            saved = module._buffers.keys() - module._non_persistent_buffers_set
            for name, buffer in module._buffers.items():
                if buffer is None:
                    continue
                if name in saved and buffer.is_floating_point():
                    # Checkpoints from before transformers saved it lack it: as it was made, then.
                    with suppress(KeyError):
                        buffer = self._read(self._name(module, name)).reshape(buffer.shape)
                module._buffers[name] = buffer.to(self._device)
            for name, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                try:
                    weight = self._read(self._name(module, name)).reshape(parameter.shape)
                except KeyError as error:
                    raise ValueError(f"the model has no tensor {error}") from None
                module._parameters[name] = nn.Parameter(weight.to(self._device), False)

    def rows_only(self, table: nn.Module, read_rows: ReadRows) -> None:
        """Let an embedding read the rows that it is asked for, whenever it is."""
        import torch
        from torch import nn

        name = self._name(table, "weight")

        def fetch(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            ids, place = torch.unique(inputs[0], return_inverse=True)
            rows = read_rows(ids.tolist(), name).to(self._device)
            module._parameters["weight"] = nn.Parameter(rows, False)
            return (place,)

        table.padding_idx = None  # type: ignore[assignment]
        table.register_forward_pre_hook(fetch)


def _below(root: nn.Module, apart: Container[nn.Module]) -> Iterator[nn.Module]:
    """Yield `root` and the modules in it, but for those in `apart` and what is in them."""
    yield root
    for child in root.children():
        if child not in apart:
            yield from _below(child, apart)

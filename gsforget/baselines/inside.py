"""Looking into a model's blocks: which modules they are, and what they put out."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from gsforget.lora.blocks import find_feed_forward

if TYPE_CHECKING:
    from torch import Tensor, nn


def find_blocks(model: nn.Module, example: Tensor) -> list[str]:
    """Dotted names of the numbered modules that hold the feed-forward networks, in the order in which they run.

    `blocks.3.mlp` lies in `blocks.3`, `encoder.layers.encoder_layer_3.mlp` in `encoder.layers.encoder_layer_3`.

    Args:
        example: images, float32 [B, C, H, W], on the model's device.
    """
    names = [f.name for f in find_feed_forward(model, example)]
    numbered = (re.match(r"(.*\d)(?:\.|$)", name) for name in names)
    return list(dict.fromkeys(m.group(1) if m else name for m, name in zip(numbered, names)))


class BlockTap:
    """While it is open, keeps the last output of some modules, with its gradient where there is one: `outputs` by name."""

    def __init__(self, model: nn.Module, names: list[str]):
        self.modules = {name: model.get_submodule(name) for name in names}
        self.outputs: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> BlockTap:
        self._handles = [m.register_forward_hook(self._keep(name)) for name, m in self.modules.items()]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, name: str):
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self.outputs[name] = output if isinstance(output, torch.Tensor) else output[0]

        return keep

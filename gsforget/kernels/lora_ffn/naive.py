"""A feed-forward network with LoRA on every linear layer, in plain PyTorch: the truth beside the kernels.

With z_i = W_i x + c_i + B_i A_i x for the layers that read the input, the network is

    y = W h + c + B A h ,   h = act(z_0)            (one first layer)
                            h = act(z_0) * z_1      (two: a gated network, Shazeer, arXiv 2002.05202)

LoRA as in Hu et al., 2021, eq. 3, with scale 1 (a scale belongs into B).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Layer(NamedTuple):
    """A frozen linear layer with its pair: `weight` [out, in], `bias` [out] or None, `a` [rank, in], `b` [out, rank]."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor


def quick_gelu(z: Tensor) -> Tensor:
    """z sigmoid(1.702 z), as CLIP has it."""
    return z * torch.sigmoid(1.702 * z)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda z: nn.functional.gelu(z, approximate="tanh"),
    "silu": nn.functional.silu,
    "quick_gelu": quick_gelu,
    "relu": nn.functional.relu,
}


def naive_lora_ffn(x: Tensor, firsts: tuple[Layer, ...], last: Layer, activation: str = "gelu") -> Tensor:
    """x [..., K] -> y [..., K'], through one or two first layers and the last one."""
    z = [_adapted(x, layer) for layer in firsts]
    h = ACTIVATIONS[activation](z[0])
    return _adapted(h if len(z) == 1 else h * z[1], last)


def _adapted(x: Tensor, layer: Layer) -> Tensor:
    base = nn.functional.linear(x, layer.weight, layer.bias)
    return base + nn.functional.linear(nn.functional.linear(x, layer.a), layer.b)

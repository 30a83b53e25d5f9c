"""The LoRA feed-forward network on plain PyTorch operations, with a backward of its own.

What it saves over autograd: the pairs' terms are added in place, no gradient of a frozen weight is formed or kept
ready, and on a GPU the hidden layer is computed again instead of kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsforget.kernels.lora_ffn.naive import ACTIVATIONS, Layer

Pair = tuple[Tensor, Tensor]


def keeps_hidden(x: Tensor) -> bool:
    """Whether h stays in memory for the backward: on a CPU it costs more time to compute it again than to keep it."""
    return x.device.type == "cpu"


def forward(
    x: Tensor, firsts: tuple[Layer, ...], last: Layer, activation: str, keep: bool
) -> tuple[Tensor, list[Tensor], bool]:
    """x [M, K] -> y [M, K'] and what the backward needs: z_i and S_i of each first layer, S of the last, h or nothing.

    Last comes whether z_i holds its pair's term, which it does here.
    """
    z, s = zip(*(_adapted(x, layer) for layer in firsts))
    h = _hidden(z, activation)
    y, s_last = _adapted(h, last)
    return y, [*z, *s, s_last, *([h] if keep and keeps_hidden(x) else [])], True


def fused_up(x: Tensor, firsts: tuple[Layer, ...]) -> bool:
    """As in `triton_path`."""
    del x, firsts
    return True


def backward(
    dy: Tensor, x: Tensor, saved: list[Tensor], firsts: tuple[Layer, ...], last: Layer, activation: str, need_dx: bool,
    complete: bool,
) -> tuple[Tensor | None, list[Pair]]:  # fmt: skip
    """dy [M, K'] -> dx [M, K] or None, and (dA, dB) of each first layer and of the last."""
    assert complete
    count = len(firsts)
    z, s, s_last = saved[:count], saved[count : 2 * count], saved[2 * count]
    h = saved[2 * count + 1] if len(saved) > 2 * count + 1 else _hidden(z, activation)
    ds, db = dy @ last.b, dy.t() @ s_last
    dh = (dy @ last.weight).addmm_(ds, last.a)
    da = ds.t() @ h
    dz = _through_activation(dh, z, activation)
    dx, pairs = None, []
    for dzi, si, layer in zip(dz, s, firsts):
        dsi = dzi @ layer.b
        pairs.append((dsi.t() @ x, dzi.t() @ si))
        if need_dx:
            dx = dzi @ layer.weight if dx is None else dx.addmm_(dzi, layer.weight)
            dx.addmm_(dsi, layer.a)
    return dx, [*pairs, (da, db)]


def _adapted(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """W x + c + B A x, and S = x A^T.  The base product is the operation that nn.Linear runs."""
    s = x @ layer.a.t()
    return torch.nn.functional.linear(x, layer.weight, layer.bias).addmm_(s, layer.b.t()), s


def _hidden(z: tuple[Tensor, ...] | list[Tensor], activation: str) -> Tensor:
    h = ACTIVATIONS[activation](z[0])
    return h if len(z) == 1 else h * z[1]


def _through_activation(dh: Tensor, z: list[Tensor], activation: str) -> list[Tensor]:
    """Gradients of z_i from that of h."""
    upstream = dh if len(z) == 1 else dh * z[1]
    first = _slope_times(upstream, z[0], activation)
    return [first] if len(z) == 1 else [first, dh * ACTIVATIONS[activation](z[0])]


def _slope_times(d: Tensor, z: Tensor, activation: str) -> Tensor:
    """d act'(z)."""
    if activation in ("gelu", "gelu_tanh"):
        return torch.ops.aten.gelu_backward(d, z, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation == "silu":
        return torch.ops.aten.silu_backward(d, z)
    if activation == "relu":
        return torch.ops.aten.threshold_backward(d, z, 0)
    s = torch.sigmoid(1.702 * z)
    return d * s * (1 + 1.702 * z * (1 - s))

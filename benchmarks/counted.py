"""Bytes and floating-point operations of one LoRA-FFN step and of one proximal step on a GPU; nothing is measured.

An operation takes the longer of its arithmetic and its traffic, every operand read or written once; operations follow one
another.  Launches cost nothing here, so that the figures hold for large batches only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gsforget.kernels.group_prox import proximal_adam_step

# What an H200 is assumed to reach in bfloat16: operations and bytes per second.
PEAK, BANDWIDTH, BYTES = 780e12, 4.3e12, 2
OWN_RATE = 0.85  # share of the vendor's rate that a product of our own is counted with


@dataclass(frozen=True)
class Op:
    flops: float
    elements: float
    rate: float = 1.0

    @property
    def seconds(self) -> float:
        return max(self.flops / (self.rate * PEAK), self.elements * BYTES / BANDWIDTH)


def _product(m: int, n: int, k: int, again: int = 0, rate: float = 1.0) -> Op:
    """[m, k] x [k, n]; again: further elements that the operation touches, such as an output that it adds to."""
    return Op(2.0 * m * n * k, m * k + k * n + m * n + again, rate)


def _pass(elements: int) -> Op:
    return Op(0, elements)


def frozen(m: int, k: int, n: int, r: int) -> list[Op]:
    forward = [_product(m, n, k), _pass(2 * m * n), _product(m, k, n)]
    return [*forward, _product(m, n, k), _pass(3 * m * n), _product(m, k, n)]


def peft(m: int, k: int, n: int, r: int) -> list[Op]:
    """W x; A x; B S; times scale; sum.  Backward: times scale; dS, dB; dx twice and summed; dA."""

    def forward(i: int, o: int) -> list[Op]:
        return [_product(m, o, i), _product(m, r, i), _product(m, o, r), _pass(2 * m * o), _pass(3 * m * o)]

    def backward(i: int, o: int) -> list[Op]:
        skinny = [_product(m, r, o), _product(o, r, m), _product(m, i, r), _product(r, i, m)]
        return [_pass(2 * m * o), *skinny, _product(m, i, o), _pass(3 * m * i)]

    return [*forward(k, n), _pass(2 * m * n), *forward(n, k), *backward(n, k), _pass(3 * m * n), *backward(k, n)]


def addmm(m: int, k: int, n: int, r: int) -> list[Op]:
    """The vendor's products, the pair added in place; h computed again in the backward."""

    def layer(i: int, o: int) -> list[Op]:
        return [_product(m, r, i), _product(m, o, i), _product(m, o, r, again=m * o)]

    def backward(i: int, o: int) -> list[Op]:
        skinny = [_product(m, r, o), _product(o, r, m), _product(r, i, m)]
        return [*skinny, _product(m, i, o), _product(m, i, r, again=m * i)]

    forward = [*layer(k, n), _pass(2 * m * n), *layer(n, k)]
    return [*forward, _pass(2 * m * n), *backward(n, k), _pass(3 * m * n), *backward(k, n)]


def ours(m: int, k: int, n: int, r: int) -> list[Op]:
    """The default of the dispatcher: the first product is our own, the others the vendor's with a pass after them."""
    up = Op(2.0 * m * n * (k + r), m * k + k * n + 2 * m * n + m * r, OWN_RATE)
    down = [_product(m, r, n), _product(m, k, n), _product(m, k, r, again=m * k)]
    over_dy = Op(4.0 * m * k * r, m * k + 2 * m * r + 2 * k * r)
    over_hidden = Op(
        8.0 * m * n * r, 3 * m * n + 3 * m * r + 3 * n * r
    )  # reads dh and z, writes dz; dS, dB, dA on the way
    back = [_product(r, k, m), _product(m, k, n), _product(m, k, r, again=m * k)]
    return [_product(m, r, k), up, *down, over_dy, _product(m, n, k), over_hidden, *back]


WAYS = {"frozen": frozen, "peft": peft, "addmm": addmm, "ours": ours}


def count(way: str, m: int, k: int, n: int, r: int) -> dict[str, float]:
    """Totals of a way for M rows of K features, N hidden ones and rank r."""
    ops = WAYS[way](m, k, n, r)
    flops, moved = sum(o.flops for o in ops), sum(o.elements for o in ops) * BYTES
    seconds = sum(o.seconds for o in ops)
    return {
        "gflop": round(flops / 1e9, 2),
        "megabytes": round(moved / 1e6, 1),
        "flop_per_byte": round(flops / moved, 1),
        "microseconds": round(1e6 * seconds, 1),
        "tflop_per_second": round(flops / seconds / 1e12, 1),
    }


def kept_bytes(way: str, m: int, k: int, n: int, r: int, size: int = BYTES) -> int:
    """Kept for the backward: one layer at a time x, z and h, ours no h; S of both layers, but nothing of either if frozen."""
    hidden = 2 if way == "peft" else 1
    own = 0 if way == "frozen" else m * k + 2 * m * r
    return (own + hidden * m * n) * size


class _Traffic(TorchDispatchMode):
    """Counts the operations that touch memory, and the bytes of what they read and write; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.moved = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given, made = (torch.utils._pytree.tree_leaves(side) for side in ((args, kwargs), result))
        written = [t for t in made if isinstance(t, torch.Tensor)]
        if written and not function.is_view:
            self.launches += 1
            self.moved += sum(t.untyped_storage().nbytes() for t in [*given, *written] if isinstance(t, torch.Tensor))
        return result


def prox(groups: int, length: int) -> dict[str, dict[str, float]]:
    """One proximal step of all groups in Adam's metric: launches, and megabytes read and written.

    Eager torch, in float64 and with twelve steps of Newton's method where the kernel takes six in float32, is run once
    and watched, launch by launch.  Our kernel reads factors, gradient and both moments once from
    memory, and again from the L2 cache in each further pass; it writes all but the gradient once.
    """
    from gsforget.kernels.group_prox.kernel import NEWTON

    lengths = torch.full((groups,), length)
    flat, grad, *moments = (torch.randn(groups * length, generator=torch.Generator().manual_seed(k)) for k in range(4))
    table = lengths, lengths.double().sqrt(), torch.ones(groups, dtype=torch.bool)
    with _Traffic() as eager:
        proximal_adam_step(flat, grad, moments[0], moments[1].abs_(), *table, 100, 1e-3, 1e-3)
    once = 4 * groups * length  # bytes of an array of all factors
    return {
        "eager": {"launches": eager.launches, "megabytes": round(eager.moved / 1e6, 1), "megabytes_from_cache": 0.0},
        "ours": {
            "launches": 1,
            "megabytes": round(7 * once / 1e6, 1),
            "megabytes_from_cache": round(4 * (NEWTON.value + 1) * once / 1e6, 1),
        },
    }

"""The same step of a feed-forward network with LoRA, forward and backward, in every way that the benchmarks compare.

A step gives y, dx and the gradients of all factors (dA1, dB1, dA2, dB2); the frozen network gives y and dx.
"""

from __future__ import annotations

import statistics
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gsforget.kernels.lora_ffn import Layer, lora_ffn, naive_lora_ffn
from gsforget.lora.blocks import FeedForward
from gsforget.lora.groups import LoRAGroups

TOKENS = 197
WIDTHS = {"vit_small": (384, 1536), "vit_base": (768, 3072), "vit_large": (1024, 4096)}
DEPTHS = {"vit_small": 12, "vit_base": 12, "vit_large": 24}


@dataclass(frozen=True)
class Problem:
    """A network's layers with gradients to their factors, its input x [B, T, K], and dy."""

    first: Layer
    last: Layer
    x: Tensor
    dy: Tensor

    @property
    def factors(self) -> list[Tensor]:
        return [self.first.a, self.first.b, self.last.a, self.last.b]

    def to(self, dtype: torch.dtype) -> Problem:
        def layer(given: Layer) -> Layer:
            w, c, a, b = (None if t is None else t.detach().to(dtype) for t in given)
            return Layer(w, c, a.requires_grad_(), b.requires_grad_())

        return Problem(
            layer(self.first), layer(self.last), self.x.detach().to(dtype).requires_grad_(), self.dy.to(dtype)
        )


def make_problem(k: int, n: int, batch: int, tokens: int, rank: int, dtype: torch.dtype, device: str) -> Problem:
    """Random weights of a trained network's scale; no factor is zero, so that every gradient counts."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=rng)).to(device, dtype)

    def layer(fan_in: int, fan_out: int) -> Layer:
        w, c = draw(fan_out, fan_in, scale=fan_in**-0.5), draw(fan_out, scale=0.1)
        a, b = draw(rank, fan_in, scale=fan_in**-0.5), draw(fan_out, rank, scale=0.1)
        return Layer(w, c, a.requires_grad_(), b.requires_grad_())

    return Problem(layer(k, n), layer(n, k), draw(batch, tokens, k).requires_grad_(), draw(batch, tokens, k))


class Step:
    """One step of a way: y, dx and the gradients of its factors; `depth` networks in a row, with residuals, if not 1."""

    def __init__(self, forward: Callable[[Tensor], Tensor], p: Problem, factors: list[Tensor], depth: int = 1):
        self.forward, self.problem, self.factors, self.depth = forward, p, factors, depth

    def __call__(self) -> list[Tensor]:
        p = self.problem
        y = self.forward(p.x)
        if self.depth > 1:
            y = p.x + y
            for _ in range(self.depth - 1):
                y = y + self.forward(y)
        return [y.detach(), *torch.autograd.grad(y, [p.x, *self.factors], p.dy)]

    def stacked(self, depth: int) -> Step:
        return Step(self.forward, self.problem, self.factors, depth)


def plain(p: Problem) -> Step:
    return Step(lambda x: naive_lora_ffn(x, (p.first,), p.last), p, p.factors)


def ours(p: Problem, backend: str | None = None) -> Step:
    return Step(lambda x: lora_ffn(x, p.first, p.last, backend=backend), p, p.factors)


def frozen(p: Problem) -> Step:
    """The network without LoRA."""
    return Step(_network(p), p, [])


def hooks(p: Problem) -> Step:
    """One LoRA layer at a time, as a forward hook adds it where a network's form is not known."""
    network = _network(p)
    groups = LoRAGroups(network, [FeedForward("", ("fc1", "fc2"))], p.first.a.shape[0], seed=0)
    for pair, layer in zip(groups.pairs, (p.first, p.last)):
        pair.a.data.copy_(layer.a.detach())
        pair.b.data.copy_(layer.b.detach())
    return Step(network, p, [t for pair in groups.pairs for t in (pair.a, pair.b)])


def peft(p: Problem, compiled: str | None = None) -> Step:
    """PEFT's LoRA layers with scale 1 and factors of the network's own type; compiled: a mode of torch.compile."""
    from peft import LoraConfig, inject_adapter_in_model

    rank = p.first.a.shape[0]
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=["fc1", "fc2"])
    network = inject_adapter_in_model(config, _network(p)).to(p.x.dtype)
    factors = []
    for module, layer in zip((network.fc1, network.fc2), (p.first, p.last)):
        for own, given in ((module.lora_A.default.weight, layer.a), (module.lora_B.default.weight, layer.b)):
            own.data.copy_(given.detach())
            factors.append(own)
    if compiled is None:
        return Step(network, p, factors)
    fast = torch.compile(network, mode=compiled)

    def forward(x: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # max-autotune writes its outputs in the same place each time
        return fast(x)

    return Step(forward, p, factors)


def _network(p: Problem) -> nn.Module:
    (n, k), device, dtype = p.first.weight.shape, p.x.device, p.x.dtype
    layers = OrderedDict(fc1=nn.Linear(k, n), act=nn.GELU(), fc2=nn.Linear(n, k))
    network = nn.Sequential(layers).to(device, dtype).requires_grad_(False)
    for linear, layer in ((network.fc1, p.first), (network.fc2, p.last)):
        linear.weight.data.copy_(layer.weight)
        linear.bias.data.copy_(layer.bias)
    return network


def truth(p: Problem) -> list[Tensor]:
    return plain(p.to(torch.float64))()


def truth_frozen(p: Problem) -> list[Tensor]:
    return frozen(p.to(torch.float64))()


def off(got: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """The largest ||got - wanted|| / ||wanted|| of y and all gradients; NaN where any is."""
    errors = [((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, wanted, strict=True)]
    return float("nan") if any(e != e for e in errors) else max(errors)


def saved_bytes(step: Callable[[], object], p: Problem) -> int:
    """Bytes that autograd keeps from forward to backward, each storage once, without the network's own parameters."""
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        step()
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept if not _is_parameter(t, p)}
    return sum(sizes.values())


def _is_parameter(t: Tensor, p: Problem) -> bool:
    """Whether it has no axis of rows: weights, biases and factors, also those that a way has copied."""
    rows = p.x.shape[0] * p.x.shape[1]
    return rows not in (t.shape[0] if t.ndim else 0, t.shape[:-1].numel(), t.shape[-1] if t.ndim else 0)


def interleaved(ways: dict[str, Any], rounds: int, clock: Callable[[Any], float], warm: int = 1) -> dict[str, list]:
    """Milliseconds of each way, measured in turn, so that a busy moment meets all; each round begins with another way."""
    names, times = list(ways), {name: [] for name in ways}
    for number in range(warm + rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            took = clock(ways[name])
            if number >= warm:
                times[name].append(took)
    return times


def summary(times: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    return {"ms": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)], "least": round(min(times), 4)}

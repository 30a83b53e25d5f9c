"""LoRA pairs on the feed-forward networks of a model: one network = one group, all factors in one flat buffer.

For a linear layer with weight W [out, in] the adapted layer computes W x + B A x (Hu et al., 2021, eq. 3, with scale 1),
A [rank, in], B [out, rank].  The group of GS-LoRA (arXiv 2403.11530, section 3.3) is the set of all pairs of one block's
feed-forward network.  Factors of all groups lie one after another in one 1-D float32 buffer, so that an optimiser or
proximal step is one pass over the buffer with a table of group offsets.  The model itself is not rebuilt: where a
network has a known form (see `forms`) one fused function takes the place of its forward, elsewhere each pair adds its
term through a forward hook, and a group that is not active has neither.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from gsforget.kernels.lora_ffn import Layer, lora_ffn
from gsforget.lora.forms import Form, half_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

    from gsforget.lora.blocks import FeedForward


@dataclass
class LoRAPair:
    """The pair of one linear layer.  `a` [rank, in] and `b` [out, rank] are views of the flat buffer."""

    name: str  # dotted name of the linear layer
    module: nn.Linear
    group: int
    a: Tensor
    b: Tensor

    @property
    def parameter(self) -> str:
        return f"{self.name}.weight"

    def delta(self) -> Tensor:
        """The product B A, [out, in]."""
        return self.b.detach() @ self.a.detach()


class LoRAGroups:
    """LoRA factors of one request, with their group table.

    Attributes:
        flat, grad: float32 [n], factors and their gradients (gradients of a backward pass arrive here by themselves).
        offsets, lengths: int64 [G], where each group lies in the buffer.
        weights: float64 [G], what a group's penalty is multiplied with: sqrt(length) (Yuan and Lin, 2006) times the
            share of the groups that lie from this one on, which is what training must run while this one is active.
        active: bool [G].
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[FeedForward],
        rank: int,
        seed: int,
        forms: Sequence[Form | None] = (),
    ):
        """Attach LoRA to every linear layer of the given feed-forward networks; logits stay as they are (B = 0).

        forms: how each network is put together, from `find_forms`; nothing, or None for a network: its own forward.
        A is drawn from U(-1/sqrt(in), 1/sqrt(in)) (loralib's initialisation) on the CPU, the same on every device.
        A rank above a layer's smaller side is cut to it.
        """
        modules = dict(model.named_modules())
        device = next(model.parameters()).device
        self.blocks = blocks
        self.rank = rank
        shapes = [[(n, *_sides(modules[n], rank)) for n in block.linears] for block in blocks]
        lengths = [sum(r * (i + o) for _, r, i, o in group) for group in shapes]
        self.lengths = torch.tensor(lengths)
        self.offsets = torch.cumsum(self.lengths, 0) - self.lengths
        cost = torch.arange(len(blocks), 0, -1, dtype=torch.float64) / len(blocks)
        self.weights = (self.lengths.to(torch.float64).sqrt() * cost).to(device)
        self.active = torch.ones(len(blocks), dtype=torch.bool, device=device)
        self.flat = torch.zeros(sum(lengths), device=device)
        self.grad = torch.zeros_like(self.flat)
        generator = torch.Generator().manual_seed(seed)
        self.pairs: list[LoRAPair] = []
        self.forms = list(forms) or [None] * len(blocks)
        self._modules = modules
        self._hooks: dict[str, RemovableHandle] = {}
        position = 0
        for group, members in enumerate(shapes):
            for name, r, fan_in, fan_out in members:
                a = self._leaf(position, (r, fan_in))
                b = self._leaf(position + r * fan_in, (fan_out, r))
                bound = 1 / math.sqrt(fan_in)
                a.data.copy_(torch.empty(r, fan_in).uniform_(-bound, bound, generator=generator))
                self.pairs.append(LoRAPair(name, modules[name], group, a, b))
                position += r * (fan_in + fan_out)
        self.attach()

    def _leaf(self, start: int, shape: tuple[int, int]) -> Tensor:
        """A leaf tensor over a piece of the flat buffer whose gradient accumulates into the flat gradient."""
        end = start + shape[0] * shape[1]
        leaf = self.flat[start:end].view(shape).detach().requires_grad_()
        leaf.grad = self.grad[start:end].view(shape)
        return leaf

    def __len__(self) -> int:
        return len(self.blocks)

    def active_indices(self) -> list[int]:
        return [g for g, alive in enumerate(self.active.tolist()) if alive]

    def attach(self) -> None:
        """Let active groups take part in the model's forward, and no others."""
        alive = self.active.tolist()
        self._give_back_forwards()
        for group, form in enumerate(self.forms):
            if form is not None and alive[group]:
                own = {p.name: p for p in self.pairs if p.group == group}
                self._modules[form.module].forward = _fused(form, own)
        for pair in self.pairs:
            if self.forms[pair.group] is not None:
                continue
            if alive[pair.group] and pair.name not in self._hooks:
                self._hooks[pair.name] = pair.module.register_forward_hook(_adder(pair))
            elif not alive[pair.group] and pair.name in self._hooks:
                self._hooks.pop(pair.name).remove()

    def entry(self, group: int) -> str:
        """Dotted name of the first module of a group that the model calls while the group is active."""
        form = self.forms[group]
        return form.module if form is not None else next(p.name for p in self.pairs if p.group == group)

    def detach(self) -> None:
        """Take everything off: the model computes what it computed before."""
        self._give_back_forwards()
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()

    def _give_back_forwards(self) -> None:
        """Modules that are computed as a whole get the forward of their class again."""
        for form in self.forms:
            if form is not None:
                self._modules[form.module].__dict__.pop("forward", None)

    def retire(self, groups: Iterable[int]) -> None:
        """Set groups to exactly zero and take them out of training."""
        for group in groups:
            start, length = int(self.offsets[group]), int(self.lengths[group])
            self.flat[start : start + length] = 0
            self.grad[start : start + length] = 0
            self.active[group] = False
        self.attach()

    def norms(self) -> Tensor:
        """Euclidean norm of each group's factors, float32 [G]."""
        return torch.stack([piece.norm() for piece in self.flat.split(self.lengths.tolist())])

    def named_deltas(self) -> dict[str, LoRAPair]:
        """Pairs of active groups with a product that is not zero, by the name of the weight that they change."""
        return {
            p.parameter: p for p in self.pairs if self.active[p.group] and p.b.detach().any() and p.a.detach().any()
        }


def _sides(module: nn.Module, rank: int) -> tuple[int, int, int]:
    assert isinstance(module, nn.Linear)
    return min(rank, module.in_features, module.out_features), module.in_features, module.out_features


def _fused(form: Form, pairs: dict[str, LoRAPair]):
    """A forward that computes a whole network with its pairs."""

    def layer(name: str, half: int | None = None) -> Layer:
        pair = pairs[name]
        bias = pair.module.bias
        return Layer(
            half_of(pair.module.weight, half),
            None if bias is None else half_of(bias, half),
            pair.a,
            half_of(pair.b, half),
        )

    def forward(x: Tensor) -> Tensor:
        return lora_ffn(x, [layer(*first) for first in form.firsts], layer(form.last), form.activation)

    return forward


def _adder(pair: LoRAPair):
    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        return output + nn.functional.linear(nn.functional.linear(x, pair.a.to(x.dtype)), pair.b.to(x.dtype))

    return add

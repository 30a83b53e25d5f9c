"""Which feed-forward networks are one of the forms that a fused function computes, found by trying.

A module that holds a network's linear layers is run on real activations, and its output compared with
`act(first x) -> last` and its gated variants.  What agrees can be computed by `gsforget.kernels.lora_ffn` in the module's
place; anything else (a norm in between, a residual inside, a depthwise convolution) keeps its own forward, and the LoRA
pairs join it layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gsforget.kernels.lora_ffn import ACTIVATIONS

if TYPE_CHECKING:
    from gsforget.lora.blocks import FeedForward

AGREES = 1e-5  # largest difference of outputs, as a share of the largest output


@dataclass(frozen=True)
class Form:
    """How a module's linear layers are put together.

    Attributes:
        module: dotted name of the module that can be computed as a whole.
        activation: as in `gsforget.kernels.lora_ffn.ACTIVATIONS`.
        firsts: for each first layer, the one activated first: which linear layer it is, and which half of its
            outputs (None: all).
    """

    module: str
    activation: str
    firsts: tuple[tuple[str, int | None], ...]
    last: str


@torch.no_grad()
def find_forms(model: nn.Module, blocks: list[FeedForward], example: Tensor) -> list[Form | None]:
    """The form of each network, None where it has none of the known ones.

    Args:
        model: in eval mode; left as it is.
        example: images, float [B, C, H, W], on the model's device.
    """
    modules = dict(model.named_modules())
    seen: dict[str, list[tuple[tuple[Any, ...], dict[str, Any], Any]]] = {block.name: [] for block in blocks}

    def note(name: str):
        def hook(_module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
            seen[name].append((inputs, options, output))

        return hook

    handles = [
        modules[b.name].register_forward_hook(note(b.name), with_kwargs=True)
        for b in blocks
        if b.name in modules and b.name not in b.linears
    ]
    try:
        model(example)
    finally:
        for handle in handles:
            handle.remove()
    return [_form(block, modules, seen[block.name]) for block in blocks]


def _form(block: FeedForward, modules: dict[str, nn.Module], calls: list[Any]) -> Form | None:
    """The form that agrees best with the module's one call."""
    if (
        len(calls) != 1
        or "forward" in modules[block.name].__dict__
        or any(_has_hooks(modules[n]) for n in block.linears)
    ):
        return None  # what somebody else has put there would be left out, or be gone afterwards
    inputs, options, output = calls[0]
    best: tuple[float, Form | None] = (AGREES, None)
    if len(inputs) != 1 or options or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
        return None
    scale = output.abs().max()
    for form in _candidates(block, modules):
        tried = _run(form, modules, inputs[0])
        if tried.shape != output.shape:
            continue
        apart = ((tried - output).abs().max() / scale).item()
        if apart < best[0]:
            best = (apart, form)
    return best[1]


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _candidates(block: FeedForward, modules: dict[str, Any]) -> Iterator[Form]:
    *firsts, last = block.linears
    width = modules[last].in_features
    orders: list[tuple[tuple[str, int | None], ...]] = []
    if len(firsts) == 1 and modules[firsts[0]].out_features == width:
        orders = [((firsts[0], None),)]
    elif len(firsts) == 1 and modules[firsts[0]].out_features == 2 * width:
        orders = [((firsts[0], 0), (firsts[0], 1)), ((firsts[0], 1), (firsts[0], 0))]
    elif len(firsts) == 2 and all(modules[f].out_features == width for f in firsts):
        orders = [((firsts[0], None), (firsts[1], None)), ((firsts[1], None), (firsts[0], None))]
    for order in orders:
        for activation in ACTIVATIONS:
            yield Form(block.name, activation, order, last)


def _run(form: Form, modules: dict[str, Any], x: Tensor) -> Tensor:
    def part(name: str, half: int | None) -> Tensor:
        out = modules[name](x)
        return out if half is None else out.chunk(2, -1)[half]

    h = ACTIVATIONS[form.activation](part(*form.firsts[0]))
    for other in form.firsts[1:]:
        h = h * part(*other)
    return modules[form.last](h)


def half_of(tensor: Tensor, half: int | None) -> Tensor:
    """A half of the rows of a weight, a bias or a factor b; all of them for None."""
    return tensor if half is None else tensor.chunk(2)[half]

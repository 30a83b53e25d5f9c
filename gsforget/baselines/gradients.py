"""Gradients of single images, by which some baselines say how much a weight matters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from gsforget.lora.blocks import as_logits

if TYPE_CHECKING:
    from gsforget.baselines.training import Training

GRADIENT_NUMBERS = 2**25  # numbers of per-image gradients that are held at once


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def mean_gradient(
    t: Training,
    rows: Tensor,
    targets: Tensor,
    objective: Callable[[Tensor, Tensor], Tensor],
    measure: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Mean over images of a measure of each image's own gradient, for every trained weight.

    Args:
        rows: int64 [R], the images; targets: int64 [R], one for each.
        objective: scalar from one image's logits [K] and its target.
        measure: elementwise, of gradients.
    """
    weights = {n: p.detach() for n, p in trained_weights(t.model).items()}

    def of_one(given: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
        return objective(as_logits(functional_call(t.model, given, (image[None],)))[0].float(), target)

    gradients = vmap(grad(of_one), in_dims=(None, 0, 0))
    total = {n: torch.zeros_like(w) for n, w in weights.items()}
    size = max(1, GRADIENT_NUMBERS // sum(w.numel() for w in weights.values()))
    with sdpa_kernel(SDPBackend.MATH):  # the only attention that vmap knows how to batch
        for some, aims in zip(rows.split(size), targets.split(size)):
            for name, each in gradients(weights, t.pixels(some), aims).items():
                total[name] += measure(each).sum(0)
    return {n: s / len(rows) for n, s in total.items()}

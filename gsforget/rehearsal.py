"""Relearning, rehearsed while forgetting: the model must stay forgetful a few steps into an attacker's fine-tuning.

A small edit of a model is as easily undone as it was made (arXiv 2505.22310).  So while groups settle, the loss on
forgotten images is also taken at weights that have gone a random distance in the direction in which fine-tuning on the
true labels would take them.  The gradient found there is applied to the factors as it is (first-order, as in FOMAML,
arXiv 1803.02999); the weights themselves are put back.  Moved is what runs from the first changed block on, so what
lies before it can still be reused.  The direction is Adam's first step, the gradient's sign, softened near zero so that
rounding does not decide it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gsforget import processes

DISTANCE = 0.1  # the average step, per root mean square of the tensor; drawn from 0.2 to 1.8 times this
EVERY = 2  # steps from one rehearsal to the next
SOFT = 0.1  # gradients this small, per root mean square of their tensor, count half


class Rehearsal:
    """Runs a loss at attacked weights.

    Args:
        weights: which are moved and put back, bit for bit; frozen parameters of the model, not LoRA's factors.
    """

    def __init__(self, weights: list[nn.Parameter], seed: int):
        self.weights = weights
        self.rng = torch.Generator().manual_seed(seed)

    def run(self, attack: Callable[[], Tensor], defence: Callable[[], Tensor]) -> None:
        """Backward of `defence()` at weights moved down the gradient of `attack()`; gradients reach the factors only."""
        for p in self.weights:
            p.requires_grad_(True)
        try:
            gradients = torch.autograd.grad(attack(), self.weights, allow_unused=True)
            processes.sum_(gradients)
        finally:
            for p in self.weights:
                p.requires_grad_(False)
        before = [p.detach().clone() for p in self.weights]
        far = DISTANCE * (0.2 + 1.6 * torch.rand((), generator=self.rng).item())
        try:
            with torch.no_grad():
                for p, g in zip(self.weights, gradients):
                    if g is not None:
                        p.sub_(far * rms(p) * soft_sign(g))
            defence().backward()
        finally:
            with torch.no_grad():
                for p, kept in zip(self.weights, before):
                    p.copy_(kept)


def soft_sign(gradient: Tensor) -> Tensor:
    """g / (|g| + SOFT rms(g)); zero where there is no gradient at all."""
    return gradient / (gradient.abs() + SOFT * rms(gradient) + torch.finfo(gradient.dtype).tiny)


def weights_from(model: nn.Module, first: str, example: Tensor) -> list[nn.Parameter]:
    """Parameters of the modules that are called from the module `first` on, found by running the model on an example."""
    called: list[nn.Module] = []

    def note(module: nn.Module, _: object) -> None:
        if called or module is target:
            called.append(module)

    target = model.get_submodule(first)
    handles = [m.register_forward_pre_hook(note) for m in model.modules()]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    # With all that lies inside: a module that is computed as a whole does not call its parts.
    found = {p: None for m in called for p in m.parameters() if p.is_floating_point()}
    return list(found)


def rms(values: Tensor) -> Tensor:
    """Root mean square."""
    return values.square().mean().sqrt()

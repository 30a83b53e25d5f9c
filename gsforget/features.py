"""Penultimate features: what the classifier, a model's last linear layer, reads.

They are found by running the model, not by layer names: the classifier is the linear layer whose output is the logits.
Prototypes, deep forgetting and the audit's probes all look at these features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gsforget.errors import RequestError
from gsforget.lora.blocks import as_logits

if TYPE_CHECKING:
    from torch import Tensor


def find_classifier(model: nn.Module, example: Tensor) -> str:
    """Dotted name of the linear layer whose output is the model's logits.

    Args:
        example: images, float32 [B, C, H, W], on the model's device.

    Raises:
        RequestError: kind ``no_classifier`` where no linear layer's output is the logits as they leave the model.
    """
    outputs: dict[str, Tensor] = {}

    def note(name: str):
        return lambda _module, _inputs, output: outputs.__setitem__(name, output)

    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    handles = [m.register_forward_hook(note(n)) for n, m in linears]
    try:
        with torch.no_grad():
            logits = as_logits(model(example))
    finally:
        for handle in handles:
            handle.remove()
    found = [n for n, out in outputs.items() if out.shape == logits.shape and _same(out, logits)]
    if not found:
        raise RequestError(
            "The model's logits are not the output of a linear layer, so it has no penultimate features to look at.",
            "Features can be taken from models that end in torch.nn.Linear.",
            "no_classifier",
        )
    return found[-1]


class FeatureTap:
    """While it is open, keeps the classifier's last input: `features`, [B, d], with its gradient where there is one.

    Args:
        classifier: dotted name, as `find_classifier` gives it.
    """

    def __init__(self, model: nn.Module, classifier: str):
        self.module = model.get_submodule(classifier)
        self.features: Tensor = torch.empty(0)
        self._handle: Any = None

    def __enter__(self) -> FeatureTap:
        self._handle = self.module.register_forward_pre_hook(self._keep)
        return self

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()
        self._handle = None

    def _keep(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.features = inputs[0]


@torch.no_grad()
def features_and_logits(model: nn.Module, classifier: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [B, C, H, W] -> features float32 [B, d] and logits float32 [B, K]."""
    with FeatureTap(model, classifier) as tap:
        logits = as_logits(model(images)).float()
    return tap.features.float(), logits


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)

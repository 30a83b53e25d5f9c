"""What a classifier is asked, and how its answers are counted: rights on unmasked logits, and bounds of their loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gsforget.features import FeatureTap, find_classifier
from gsforget.gates import paired_drop
from gsforget.lora.blocks import as_logits
from gsforget.tasks.base import Reader, Score, Seen

if TYPE_CHECKING:
    from torch import Tensor, nn


def logits_reader(model: nn.Module) -> Reader:
    """Outputs are logits [B, K]."""
    return lambda images: Seen(as_logits(model(images)))


def features_reader(model: nn.Module, example: Tensor) -> Reader:
    """Outputs are logits [B, K], features what the classifier reads.  Raises RequestError ``no_classifier``."""
    classifier = find_classifier(model, example)

    def read(images: Tensor) -> Seen:
        with FeatureTap(model, classifier) as tap:
            logits = as_logits(model(images))
        return Seen(logits, tap.features)

    return read


def correct(outputs: Tensor, labels: Tensor) -> Tensor:
    """Which predictions are right: logits [N, K] and int64 [N] -> bool [N]."""
    return outputs.argmax(1) == labels


def score(before: Tensor, after: Tensor, forget: Tensor) -> Score:
    """From which images were named rightly before and are now, and which are to be forgotten, bool [N] each."""
    before, after, forget = before.cpu(), after.cpu(), forget.cpu()
    accuracies = percent(after[forget]), percent(after[~forget]), percent(before[~forget])
    return Score(*accuracies, *drop_bounds(before[~forget], after[~forget]))


def drop_bounds(before: Tensor, after: Tensor) -> tuple[float | None, float | None]:
    """One-sided 95 % bounds of a loss of accuracy in points, from bool [N] and bool [N]; None without images."""
    if not len(before):
        return None, None
    return paired_drop(before.numpy(), after.numpy())[1], -paired_drop(after.numpy(), before.numpy())[1]


def percent(flags: Tensor) -> float | None:
    """Share of flags, bool [N]; None where there are none."""
    return 100 * flags.float().mean().item() if len(flags) else None


def nothing() -> Tensor:
    """Flags before any is known."""
    return torch.zeros(0, dtype=torch.bool)

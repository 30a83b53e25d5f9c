"""What a classifier is asked, and how its answers are counted: rights on unmasked logits, and bounds of their loss."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from gsforget.features import FeatureTap, find_classifier
from gsforget.gates import paired_drop
from gsforget.lora.blocks import as_logits
from gsforget.metrics import percent
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


def score(before: Tensor, after: Tensor, forget: Tensor, shows: Tensor, labels: Tensor | None = None) -> Score:
    """From which images were named rightly before and are now, and which are to be forgotten, bool [N] each.

    Args:
        shows: int64 [N], which image each is a view of.
        labels: int64 [N]: then the loss of the class that lost most is said as well.
    """
    before, after, kept = before.cpu(), after.cpu(), ~forget.cpu()
    accuracies = percent(after[~kept]), percent(after[kept]), percent(before[kept])
    if not kept.any():
        return Score(*accuracies, None, None)
    was, now, image = (x.cpu()[kept].numpy() for x in (before, after, shows))
    found = Score(*accuracies, paired_drop(was, now, image)[1], -paired_drop(now, was, image)[1])
    if labels is None:
        return found
    truth = labels.cpu()[kept].numpy()
    worst = max(paired_drop(was[mine], now[mine], image[mine])[1] for mine in (truth == k for k in np.unique(truth)))
    return replace(found, class_bound=worst)


def nothing() -> Tensor:
    """Flags before any is known."""
    return torch.zeros(0, dtype=torch.bool)

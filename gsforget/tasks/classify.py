"""Closed-set image classification: forget whole classes.

Retained and forgotten images alike are taught the answer that the model before the request would have given had the
forgotten classes never existed: its own softmax with these classes removed and the rest renormalised.  On forgotten
images a little bounded ascent is added, ReLU(BND - CE) (GS-LoRA, arXiv 2403.11530, eq. 6).  Measured on 100 classes,
plain ascent costs retained accuracy 6 points, masked targets none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from gsforget.tasks.base import Losses

ASCENT_WEIGHT = 0.2


def default_bound(num_classes: int) -> float:
    """BND in nats: one above the entropy of guessing, where the true class has less than 1/(e K) of the probability."""
    return math.log(num_classes) + 1


@dataclass(frozen=True)
class Classification:
    """Losses for one request.

    Attributes:
        num_classes: K, columns of the logits.
        forget: class indices to forget now.
        erased: class indices forgotten by earlier requests; they stay out of every target.
        bound: BND in nats.
    """

    num_classes: int
    forget: tuple[int, ...]
    erased: tuple[int, ...] = ()
    bound: float = 0.0
    name: str = "classify"

    def targets(self, outputs: Tensor) -> Tensor:
        """Masked and renormalised softmax of the model before the request: logits [N, K] -> probabilities [N, K]."""
        masked = outputs.clone()
        masked[:, list(self.forget + self.erased)] = -torch.inf
        return masked.softmax(1)

    def losses(self, outputs: Tensor, targets: Tensor, labels: Tensor, forget: Tensor) -> Losses:
        """logits [B, K], probabilities [B, K], int64 [B], bool [B] -> scalar losses, each a mean over its images."""
        distance = -(targets * log_softmax(outputs.float(), 1)).sum(1)
        retain = _mean(distance[~forget])
        ascent = (self.bound - cross_entropy(outputs[forget].float(), labels[forget], reduction="none")).relu()
        forgotten = _mean(distance[forget]) + ASCENT_WEIGHT * _mean(ascent)
        return Losses(retain + forgotten, retain, forgotten)

    def correct(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return outputs.argmax(1) == labels


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(1, values.numel())

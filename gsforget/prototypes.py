"""Prototypes of GS-LoRA++ (arXiv 2501.09705, section 3.4): class means of the frozen model's features.

They are means over the training images of the request, taken from the model before the request, which nothing changes
while they are in use; the hash of its weights is kept with them.  Distances are squared differences per feature in
units of the retained images' standard deviation, averaged over the features, so that 1 is a typical deviation whatever
the model.  Prototypes live in memory only: class means of people's images are never written to disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Prototypes:
    """Class means of a frozen model's penultimate features.

    Attributes:
        means: float32 [K, d]; rows of classes without images are zero and never used.
        scale: float32 [d], standard deviation of each feature over retained images.
        weights_sha256: hash of the weights that the features came from.
    """

    means: Tensor
    scale: Tensor
    weights_sha256: str

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, retain: Tensor, num_classes: int, weights_sha256: str) -> Prototypes:
        """From features, float32 [N, d], int64 labels [N], and bool [N]: which images are retained."""
        sums = torch.zeros(num_classes, features.shape[1], device=features.device).index_add_(0, labels, features)
        counts = torch.bincount(labels, minlength=num_classes).clamp_min(1)
        return cls(sums / counts[:, None], scale_of(features[retain]), weights_sha256)

    def distances(self, features: Tensor, labels: Tensor) -> Tensor:
        """Distance of each image's feature, [B, d], to the prototype of its class: [B]."""
        return (((features - self.means[labels]) / self.scale) ** 2).mean(1)


def scale_of(features: Tensor) -> Tensor:
    """Standard deviation per feature, [N, d] -> [d], at least a fifth of the features' own size.

    A few images, or those of one class, hardly differ: their deviation alone would make every change infinitely far.
    """
    size = features.square().mean().sqrt()
    return features.std(0, unbiased=False).clamp_min((0.2 * size).clamp_min(1e-6).item())

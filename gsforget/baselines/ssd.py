"""SSD, selective synaptic dampening: shrink the weights that matter to the forgotten images more than to all, without training.

Foster et al., AAAI 2024 (arXiv 2308.07707), equations 4 to 6, with diagonals of the empirical Fisher information F_D (all
training images of classes not erased before) and F_f (forgotten ones): where F_f > alpha F_D,
w <- min(lambda F_D / F_f, 1) w.  Published: alpha 10, for ViTs 5, for faces 50; lambda 1, for faces 0.1.  These are for one
class among many: F_D holds the forgotten images too, so F_f / F_D is never above the inverse of their share, and no weight
is chosen where a fifth of the images is to be forgotten and alpha is 5.

What differs from the release: Fisher diagonals are means over squared gradients of single images, as the paper has it; the
release squares the gradient of a batch's mean loss, which depends on batch size and order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from gsforget.baselines.base import BaselineRequest, Method, Result
from gsforget.baselines.gradients import mean_gradient
from gsforget.baselines.training import Optimisation, Training

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gsforget.views import Images


@dataclass(frozen=True)
class SSDSettings:
    """alpha: how many times more a weight must matter; dampening: the paper's lambda; head: whether it is dampened too."""

    alpha: float = 5.0
    dampening: float = 1.0
    head: bool = True


def fisher(t: Training, rows: Tensor) -> dict[str, Tensor]:
    """Mean over images of the squared gradient of each image's CE, by the name of the weight that trains."""
    return mean_gradient(t, rows, t.labels[rows.to(t.device)], cross_entropy, torch.square)


def ssd(model: nn.Module, images: Images, forget: Tensor, request: BaselineRequest, settings: SSDSettings) -> Result:
    t = Training(model, images, forget, request, Optimisation(head=settings.head))
    kept, lost = fisher(t, t.retained), fisher(t, t.forgotten)
    share = len(t.forgotten) / (len(t.retained) + len(t.forgotten))
    with torch.no_grad():
        for name, weight in t.model.named_parameters():
            if name in lost:
                whole = share * lost[name] + (1 - share) * kept[name]
                factor = (settings.dampening * whole / lost[name]).clamp(max=1)
                weight.copy_(torch.where(lost[name] > settings.alpha * whole, factor * weight, weight))
    return t.result()


METHOD = Method(
    "ssd",
    "Foster et al., AAAI 2024, arXiv 2308.07707",
    ssd,
    SSDSettings,
    ({"alpha": 10.0}, {"alpha": 3.0}, {"alpha": 2.0}, {"alpha": 1.5}, {"alpha": 1.2}, {"alpha": 2.0, "dampening": 0.5}),
)

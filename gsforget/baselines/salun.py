"""SalUn: random relabelling of those weights alone to which forgotten images matter most.

Fan et al., ICLR 2024 (arXiv 2310.12508), sections 4 and 5: a weight may change where |gradient of CE(forgotten)|, summed
over the forgotten images, is among the largest half of all weights; under this mask CE(forgotten, drawn labels) +
CE(retained), SGD 0.013, momentum 0.9, weight decay 5e-4, batch 256, 10 passes, labels drawn anew in each step.

What differs from the release: masked weights are put back after every step, since weight decay and momentum move weights
whose gradient is zero (the release did not until February 2026); the largest half is exactly a half; drawn labels are of
retained classes, in the release of any class, the true one among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from gsforget.baselines.base import BaselineRequest, Method, Result
from gsforget.baselines.training import EVAL_BATCH, Optimisation, Training

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gsforget.views import Images


@dataclass(frozen=True)
class SalUnSettings(Optimisation):
    """share: of all weights that train, how many may change."""

    lr: float = 0.013
    batch_size: int = 256
    optimiser: str = "momentum"
    weight_decay: float = 5e-4
    share: float = 0.5


def saliency_mask(t: Training, share: float) -> list[Tensor]:
    """For each weight that trains, whether it is among that share to which forgotten images matter most: bool tensors."""
    weights = [p for p in t.model.parameters() if p.requires_grad]
    sums = [torch.zeros_like(p) for p in weights]
    for rows in t.forgotten.split(EVAL_BATCH):
        loss = cross_entropy(t.logits(rows), t.labels[rows], reduction="sum")
        torch._foreach_add_(sums, torch.autograd.grad(loss, weights, materialize_grads=True))
    saliency = torch.cat([s.abs().flatten() for s in sums])
    mask = torch.zeros_like(saliency, dtype=torch.bool)
    mask[saliency.topk(int(share * len(saliency))).indices] = True
    return [m.view_as(p) for m, p in zip(mask.split([p.numel() for p in weights]), weights)]


def salun(
    model: nn.Module, images: Images, forget: Tensor, request: BaselineRequest, settings: SalUnSettings
) -> Result:
    t = Training(model, images, forget, request, settings)
    masks = saliency_mask(t, settings.share)
    weights = [p for p in t.model.parameters() if p.requires_grad]
    original = [p.detach().clone() for p in weights]
    for retained, forgotten in t.passes():
        kept = cross_entropy(t.logits(retained), t.labels[retained])
        t.step(kept + cross_entropy(t.logits(forgotten), t.wrong_labels(len(forgotten))))
        with torch.no_grad():
            for p, before, mask in zip(weights, original, masks):
                p.copy_(torch.where(mask, p, before))
    return t.result()


METHOD = Method(
    "salun",
    "Fan et al., ICLR 2024, arXiv 2310.12508",
    salun,
    SalUnSettings,
    ({"lr": 6e-3}, {"lr": 3e-2}, {"lr": 1e-1}, {"share": 0.3}, {"share": 0.7}),
)

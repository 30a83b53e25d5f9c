"""L2: wrong labels and rehearsal, with all weights drawn back to where they were, as a baseline of GS-LoRA has it.

The penalty is that of Kirkpatrick et al. (arXiv 1612.00796) with all importances 1: strength ||w - w before||^2, released
with step size 1e-4 and strength 0.05 (ImageNet100) or 0.1 (faces).  Differences from the release: see `relabelling`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gsforget.baselines.base import BaselineRequest, Method, Result
from gsforget.baselines.gradients import trained_weights
from gsforget.baselines.relabelling import Anchored, anchored

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gsforget.baselines.training import Training
    from gsforget.views import Images


def ones(t: Training) -> dict[str, Tensor]:
    return {n: torch.ones_like(p) for n, p in trained_weights(t.model).items()}


def l2(model: nn.Module, images: Images, forget: Tensor, request: BaselineRequest, settings: Anchored) -> Result:
    return anchored(model, images, forget, request, settings, ones)


METHOD = Method(
    "l2",
    "baseline of GS-LoRA: Zhao et al., CVPR 2024, arXiv 2403.11530",
    l2,
    Anchored,
    ({"strength": 0.1}, {"lr": 3e-4}, {"lr": 1e-3}, {"lr": 1e-3, "strength": 0.5}, {"lr": 3e-4, "strength": 0.0}),
)

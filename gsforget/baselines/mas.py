"""MAS: wrong labels and rehearsal, with weights drawn back by how much the length of the logits hangs on them.

Aljundi et al., ECCV 2018 (arXiv 1711.09601), equations 2 to 4: strength sum_i O_i (w_i - w_i before)^2, O_i the mean over images
of |d ||f(x)||^2 / dw_i|.  Here and in the release the squared length is divided by the number of classes.  Released with
step size 1e-4 and strength 0.002 (ImageNet100) or 5 (faces).

Difference from the release, beside those of `relabelling`: absolute values are taken image by image, as in the paper.  The
release takes them of a batch's mean gradient, in which opposite signs cancel, so its importances are smaller.  The
mean is over 512 images at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gsforget.baselines.base import BaselineRequest, Method, Result
from gsforget.baselines.gradients import mean_gradient
from gsforget.baselines.relabelling import Anchored, anchored, for_importances

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gsforget.baselines.training import Training
    from gsforget.views import Images


@dataclass(frozen=True)
class MASSettings(Anchored):
    strength: float = 0.002


def sensitivity(t: Training) -> dict[str, Tensor]:
    """How much each weight moves the logits' mean square on retained images, whichever way."""
    rows = for_importances(t)
    return mean_gradient(t, rows, t.labels[rows], lambda logits, _: logits.square().mean(), torch.abs)


def mas(model: nn.Module, images: Images, forget: Tensor, request: BaselineRequest, settings: MASSettings) -> Result:
    return anchored(model, images, forget, request, settings, sensitivity)


METHOD = Method(
    "mas",
    "Aljundi et al., ECCV 2018, arXiv 1711.09601",
    mas,
    MASSettings,
    ({"strength": 0.05}, {"lr": 1e-3, "strength": 5.0}, {"lr": 3e-4}, {"lr": 1e-3}, {"lr": 1e-3, "strength": 0.5}),
)

"""EWC: wrong labels and rehearsal, with weights drawn back by how much the retained images' answers hang on them.

Kirkpatrick et al., PNAS 2017 (arXiv 1612.00796), equation 3: strength sum_i F_i (w_i - w_i before)^2, F the diagonal of the
Fisher information, the mean square of d log p(y|x) / dw over images x and labels y that the model itself gives.  Released
with step size 1e-4 and strength 3 (ImageNet100) or 10 (faces); the paper's factor 1/2 is in the strength.

Differences from the release, beside those of `relabelling`: gradients are squared image by image (released: of means over
batches of 48, squared and multiplied by 48, which is this only where images pull in unrelated directions); labels are drawn
from the model's answers, as the Fisher information asks for (released: the true ones, whose gradients vanish as a model fits
its training images).  The mean is over 512 images at most, as many gradients take the time of a pass over thousands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from gsforget.baselines.base import BaselineRequest, Method, Result
from gsforget.baselines.gradients import mean_gradient
from gsforget.baselines.relabelling import Anchored, anchored, for_importances
from gsforget.baselines.training import EVAL_BATCH, Training

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gsforget.views import Images


@dataclass(frozen=True)
class EWCSettings(Anchored):
    strength: float = 3.0


def fisher(t: Training) -> dict[str, Tensor]:
    """Diagonal of the Fisher information on retained images, one label drawn for each."""
    rows = for_importances(t)
    with torch.no_grad():
        chances = torch.cat([t.logits(some).softmax(1).cpu() for some in rows.split(EVAL_BATCH)])
    drawn = torch.multinomial(chances, 1, generator=t.rng).flatten().to(t.device)
    return mean_gradient(t, rows, drawn, cross_entropy, torch.square)


def ewc(model: nn.Module, images: Images, forget: Tensor, request: BaselineRequest, settings: EWCSettings) -> Result:
    return anchored(model, images, forget, request, settings, fisher)


METHOD = Method(
    "ewc",
    "Kirkpatrick et al., PNAS 2017, arXiv 1612.00796",
    ewc,
    EWCSettings,
    ({"strength": 10.0}, {"lr": 3e-4}, {"lr": 1e-3}, {"lr": 1e-3, "strength": 30.0}, {"lr": 1e-3, "strength": 300.0}),
)

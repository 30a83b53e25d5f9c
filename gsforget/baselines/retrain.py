"""The positive control: weights drawn anew, trained on the retained images alone, so that there is nothing to forget.

Cross-entropy with AdamW, weight decay 0.05 and a cosine, as the release of GS-LoRA retrains (arXiv 2403.11530; 3e-4,
batch 48, 100 passes), with a larger step and batch and fewer passes, for small networks.  Its number of passes is its own and
not that of the request: what shows too little because it was trained too shortly controls nothing.  The images are seen
in mild views, since a network that starts from nothing learns them by heart otherwise.

The release draws nothing anew where it retrains on ImageNet100: it loads weights that know the forgotten classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch.nn.functional import cross_entropy

from gsforget.baselines.base import BaselineRequest, Method, Result
from gsforget.baselines.training import Optimisation, Training
from gsforget.lora.blocks import as_logits
from gsforget.views import moved, random_moves

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gsforget.views import Images


@dataclass(frozen=True)
class RetrainSettings(Optimisation):
    """
    Attributes:
        steps: at least as many, in more passes where there are few images.
        smoothing: of the labels.
        views: how far images are moved, 0 for not at all, 1 as in `gsforget.views`.
    """

    lr: float = 1e-3
    epochs: int = 60
    batch_size: int = 100
    steps: int = 3000
    smoothing: float = 0.1
    views: float = 0.5


def retrain(
    model: nn.Module, images: Images, forget: Tensor, request: BaselineRequest, settings: RetrainSettings
) -> Result:
    t = Training(model, images, forget, replace(request, epochs=settings.epochs), settings, fresh=True)
    t.epochs = max(t.epochs, math.ceil(settings.steps / t.per_epoch))
    t.total = t.epochs * t.per_epoch
    for retained, _ in t.passes():
        pixels = t.pixels(retained)
        if settings.views:
            pixels = moved(pixels, random_moves(len(retained), t.rng, settings.views))
        logits = as_logits(t.model(pixels)).float()
        t.step(cross_entropy(logits, t.labels[retained], label_smoothing=settings.smoothing))
    return t.result()


METHOD = Method(
    "retrain",
    "positive control; as in Zhao et al., CVPR 2024, arXiv 2403.11530",
    retrain,
    RetrainSettings,
    control="positive",
)

"""SCRUB: part from the original model on forgotten images and stay with it on retained ones, in turns.

Kurmanji et al., NeurIPS 2023 (arXiv 2302.09880), equation 3 and algorithm 1: a max pass follows -KL(original || student) on
forgotten images, a min pass gamma CE + alpha KL on retained ones; the first passes are max and min, the last ones min only.
The numbers are those of the authors' large-scale notebook: SGD 5e-4, momentum 0.9, weight decay 5e-4, alpha 0.001, gamma 0.99,
T 4, 2 max passes in 3, batches of 32 forgotten and 128 retained images.  Their small-scale one has Adam 5e-4, alpha 0.5,
gamma 1, T 2, 3 max passes in 10.

SCRUB-S is the smoothed variant in the release of GS-LoRA (arXiv 2403.11530): Adam 1e-4, alpha 0.001, gamma 10 (ImageNet100;
0.99 for faces), T 2, batch 48, and 10 rounds of 10 passes of which 5 are max, with a pull towards an average of the
student's weights, s sum_tensors ||w - average||, s 0.05 (faces 0.1); the average moves by a tenth after each round.
Where the request allows fewer passes there are fewer rounds, and a round that does not fit is shortened in proportion.

What differs from the releases: dropout is off, they train with it; the size of steps is constant, as it is within the first
three passes of the notebook; the last weights are the result, the release of GS-LoRA keeps the best on test images.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.nn.functional import cross_entropy

from gsforget.baselines.base import BaselineRequest, Method, Result
from gsforget.baselines.training import Optimisation, Training, distillation

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gsforget.views import Images


@dataclass(frozen=True)
class ScrubSettings(Optimisation):
    """
    Attributes:
        alpha, gamma: weights of the KL and of the CE on retained images.
        temperature: of the KL.
        forget_batch: forgotten images per step of a max pass.
        round, max_passes: passes in a round, and how many of these, from its start, begin with a max pass.
        smoothing: strength of the pull towards the average of the weights; 0 is SCRUB.
    """

    lr: float = 5e-4
    epochs: int = 3
    optimiser: str = "momentum"
    weight_decay: float = 5e-4
    cosine: bool = False
    alpha: float = 0.001
    gamma: float = 0.99
    temperature: float = 4.0
    forget_batch: int = 32
    round: int = 3
    max_passes: int = 2
    smoothing: float = 0.0


def scrub(
    model: nn.Module, images: Images, forget: Tensor, request: BaselineRequest, settings: ScrubSettings
) -> Result:
    t = Training(model, images, forget, request, settings)
    s, weights = settings, [p for p in t.model.parameters() if p.requires_grad]
    average, averaged = [p.detach().clone() for p in weights], False
    length = min(s.round, t.epochs)
    max_passes = math.ceil(s.max_passes * length / s.round)

    def pull() -> Tensor | float:
        return s.smoothing and s.smoothing * sum((p - a).norm() for p, a in zip(weights, average))

    for step, (retained, _) in enumerate(t.passes()):
        at, within = divmod(step, t.per_epoch)
        if not within and at % length < max_passes:
            for rows in t.draw("forget", len(t.forgotten)).split(s.forget_batch):
                t.step(pull() - distillation(t.logits(rows), t.taught(rows), s.temperature))
        logits = t.logits(retained)
        apart = distillation(logits, t.taught(retained), s.temperature)
        t.step(s.gamma * cross_entropy(logits, t.labels[retained]) + s.alpha * apart + pull())
        if (step + 1) % (length * t.per_epoch) == 0:
            for a, p in zip(average, weights):
                a.lerp_(p.detach(), 0.1 if averaged else 1.0)
            averaged = True
    return t.result()


SMALL_SCALE = {
    "optimiser": "adam",
    "alpha": 0.5,
    "gamma": 1.0,
    "temperature": 2.0,
    "epochs": 10,
    "round": 10,
    "max_passes": 3,
}
METHOD = Method(
    "scrub",
    "Kurmanji et al., NeurIPS 2023, arXiv 2302.09880",
    scrub,
    ScrubSettings,
    (
        SMALL_SCALE,
        {**SMALL_SCALE, "lr": 1e-4},
        {**SMALL_SCALE, "forget_batch": 512},
        {"lr": 1e-3},
        {"lr": 1e-3, "epochs": 10, "round": 10, "max_passes": 3},
        {"lr": 1e-4, "epochs": 10, "round": 10, "max_passes": 3},
    ),
)
SMOOTHED = Method(
    "scrub-s",
    "Kurmanji et al., NeurIPS 2023, arXiv 2302.09880, smoothed as in the release of arXiv 2403.11530",
    scrub,
    functools.partial(
        ScrubSettings,
        lr=1e-4,
        epochs=100,
        batch_size=48,
        optimiser="adam",
        weight_decay=0.0,
        alpha=0.001,
        gamma=10.0,
        temperature=2.0,
        forget_batch=48,
        round=10,
        max_passes=5,
        smoothing=0.05,
    ),
    ({"gamma": 0.99}, {"smoothing": 0.1}, {"lr": 3e-4}, {"lr": 1e-3}, {"alpha": 0.1}),
)

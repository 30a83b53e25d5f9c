"""Bad teaching: agree with a randomly initialised network on forgotten images, with the original one on retained ones.

Chundawat et al., AAAI 2023 (arXiv 2205.08096), equation 2, at temperature 1: Adam 1e-4, one pass over the forgotten images
and 30 % of the retained ones.  The mean over a step's images of KL(teacher || student); the release divides by the number
of classes too (the default reduction of `kl_div`), which Adam hardly feels.  Each step has as many images of either kind.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gsforget.baselines.base import BaselineRequest, Method, Result
from gsforget.baselines.training import Optimisation, Training, distillation, draw_anew

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gsforget.views import Images


@dataclass(frozen=True)
class BadTeacherSettings(Optimisation):
    """share: of the retained images, drawn once; temperature: of both teachers and the student."""

    epochs: int = 1
    optimiser: str = "adam"
    weight_decay: float = 0.0
    cosine: bool = False
    share: float = 0.3
    temperature: float = 1.0


def bad_teacher(
    model: nn.Module, images: Images, forget: Tensor, request: BaselineRequest, settings: BadTeacherSettings
) -> Result:
    t = Training(model, images, forget, request, settings)
    bad = copy.deepcopy(model).eval()
    draw_anew(bad, request.seed)
    count = math.ceil(settings.share * len(t.retained))
    t.retained = t.retained[torch.randperm(len(t.retained), generator=t.rng)[:count]]
    for retained, forgotten in t.passes():
        taught = torch.cat([t.taught(retained), t.taught(forgotten, bad)])
        t.step(distillation(t.logits(torch.cat([retained, forgotten])), taught, settings.temperature))
    return t.result()


METHOD = Method(
    "bad-teacher",
    "Chundawat et al., AAAI 2023, arXiv 2205.08096",
    bad_teacher,
    BadTeacherSettings,
    ({"epochs": 5}, {"epochs": 10}, {"lr": 3e-4, "epochs": 5}, {"lr": 1e-3, "epochs": 5}, {"share": 1.0, "epochs": 5}),
)

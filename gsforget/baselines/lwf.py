"""LwF: wrong labels, with the retained images' answers held by distillation from the model before.

Li and Hoiem, ECCV 2016 (arXiv 1606.09282), equations 1 to 3, as GS-LoRA's release combines them:
CE(forgotten, wrong) + distil KL(p before || p)(retained) + rehearse CE(retained), p softened by temperature T.  Released with
step size 1e-4, distil 0.5, T 2 and rehearse 10 (ImageNet100) or 2 (faces).  KL differs from the paper's cross entropy by what
does not depend on the weights, and p^(1/T) brought to sum 1 is the softmax of the logits over T.

Differences from the release, beside those of `relabelling`: it distils nothing.  Its term takes the log of a log_softmax, a
log of negative numbers, and puts zeros where these came out as NaN; its LwF is wrong labels and rehearsal alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from gsforget.baselines.base import BaselineRequest, Method, Result
from gsforget.baselines.relabelling import Relabelling
from gsforget.baselines.training import Training, softened

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gsforget.views import Images


@dataclass(frozen=True)
class LwFSettings(Relabelling):
    """distil, rehearse: weights of the terms on retained images; temperature: T."""

    distil: float = 0.5
    rehearse: float = 10.0
    temperature: float = 2.0


def lwf(model: nn.Module, images: Images, forget: Tensor, request: BaselineRequest, settings: LwFSettings) -> Result:
    t = Training(model, images, forget, request, settings)
    before = t.before()[1]
    for retained, forgotten in t.passes():
        kept, lost = t.logits(torch.cat([retained, forgotten])).tensor_split([len(retained)])
        loss = cross_entropy(lost, t.wrong_labels(len(forgotten)))
        loss = loss + settings.distil * softened(kept, before[retained], settings.temperature)
        t.step(loss + settings.rehearse * cross_entropy(kept, t.labels[retained]))
    return t.result()


METHOD = Method(
    "lwf",
    "Li and Hoiem, ECCV 2016, arXiv 1606.09282",
    lwf,
    LwFSettings,
    (
        {"rehearse": 2.0},
        {"lr": 3e-4},
        {"lr": 1e-3},
        {"lr": 3e-4, "rehearse": 2.0, "distil": 5.0},
        {"lr": 1e-3, "rehearse": 2.0, "distil": 5.0},
    ),
)

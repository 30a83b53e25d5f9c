"""DER and DER++: wrong labels, with the retained images' features held where they were; DER++ rehearses their labels, too.

Buzzega et al., NeurIPS 2020 (arXiv 2004.07211), equations 5 and 6: CE(forgotten, wrong) + match ||f - f before||^2(retained)
+ rehearse CE(retained), the last in DER++ only.  GS-LoRA's release matches the penultimate features where the paper matches
logits (`of`); under a frozen classifier the features settle the logits.  Released with step size 1e-4 and match 0.01
(ImageNet100, rehearse 0.5 in DER++) or 1e-3 and 0.01 (faces; DER++ 0.05, rehearse 0.005).

Differences from the release, beside those of `relabelling`: the squared distance is averaged over the images.  The release
sums it over its batch, so its weight stands here times 48, the batch's size.  DER++ rehearses the images that it matches;
paper and release draw others for it, which costs one more forward pass for the same loss on average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from gsforget.baselines.base import BaselineRequest, Method, Result
from gsforget.baselines.relabelling import Relabelling
from gsforget.baselines.training import Training

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gsforget.views import Images


@dataclass(frozen=True)
class DERSettings(Relabelling):
    """match, rehearse: weights of the terms on retained images; of: what is matched, "features" or "logits"."""

    match: float = 48 * 0.01
    rehearse: float = 0.0
    of: str = "features"


@dataclass(frozen=True)
class DERPlusSettings(DERSettings):
    rehearse: float = 0.5


def der(model: nn.Module, images: Images, forget: Tensor, request: BaselineRequest, settings: DERSettings) -> Result:
    t = Training(model, images, forget, request, settings)
    which = ("features", "logits").index(settings.of)
    before = t.before()[which]
    for retained, forgotten in t.passes():
        out = t.features_and_logits(torch.cat([retained, forgotten]))
        logits, size = out[1], len(retained)
        loss = cross_entropy(logits[size:], t.wrong_labels(len(forgotten)))
        loss = loss + settings.match * (out[which][:size] - before[retained]).square().sum(1).mean()
        t.step(loss + settings.rehearse * cross_entropy(logits[:size], t.labels[retained]))
    return t.result()


TRIALS = (
    {"lr": 3e-4},
    {"lr": 1e-3},
    {"lr": 1e-3, "match": 48 * 0.05},
    {"lr": 1e-3, "match": 0.05},
    {"lr": 1e-3, "match": 0.05, "of": "logits"},
)
METHOD = Method("der", "Buzzega et al., NeurIPS 2020, arXiv 2004.07211", der, DERSettings, TRIALS)
PLUS = Method(
    "der++",
    "Buzzega et al., NeurIPS 2020, arXiv 2004.07211",
    der,
    DERPlusSettings,
    (*TRIALS, {"lr": 1e-3, "match": 48 * 0.05, "rehearse": 0.005}, {"lr": 1e-3, "match": 0.05, "rehearse": 2.0}),
)

"""FDR: wrong labels, with the network held as a function: its logits on retained images stay near those before.

Benjamin et al., ICLR 2019 (arXiv 1805.08289): CE(forgotten, wrong) + match mean ||z - z before||_2 over retained images, the
distance in function space itself, not its square, as in GS-LoRA's release.  Released with step size 1e-3 and match 40
(ImageNet100) or 50 (faces).  Differences from the release: see `relabelling`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.linalg import vector_norm
from torch.nn.functional import cross_entropy

from gsforget.baselines.base import BaselineRequest, Method, Result
from gsforget.baselines.relabelling import Relabelling
from gsforget.baselines.training import Training

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gsforget.views import Images


@dataclass(frozen=True)
class FDRSettings(Relabelling):
    """match: weight of the distance on retained images."""

    lr: float = 1e-3
    match: float = 40.0


def fdr(model: nn.Module, images: Images, forget: Tensor, request: BaselineRequest, settings: FDRSettings) -> Result:
    t = Training(model, images, forget, request, settings)
    before = t.before()[1]
    for retained, forgotten in t.passes():
        kept, lost = t.logits(torch.cat([retained, forgotten])).tensor_split([len(retained)])
        distance = vector_norm(
            kept - before[retained], dim=1
        ).mean()  # its gradient at 0 is 0, as the step begins there
        t.step(cross_entropy(lost, t.wrong_labels(len(forgotten))) + settings.match * distance)
    return t.result()


METHOD = Method(
    "fdr",
    "Benjamin et al., ICLR 2019, arXiv 1805.08289",
    fdr,
    FDRSettings,
    ({"lr": 3e-4}, {"match": 4.0}, {"match": 1.0}, {"match": 0.3}, {"match": 0.1}, {"lr": 3e-4, "match": 0.3}),
)

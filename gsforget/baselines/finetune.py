"""Fine-tuning on the retained images alone, in the hope that the rest is overwritten (catastrophic forgetting).

Golatkar et al., CVPR 2020 (arXiv 1911.04933), as the weakest baseline: CE(retained).  Published for CIFAR: SGD 0.01 to
0.04, 5 to 10 passes, batch 256.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.nn.functional import cross_entropy

from gsforget.baselines.base import BaselineRequest, Method, Result
from gsforget.baselines.training import Optimisation, Training

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gsforget.views import Images


@dataclass(frozen=True)
class FinetuneSettings(Optimisation):
    lr: float = 1e-2
    batch_size: int = 256
    optimiser: str = "momentum"
    weight_decay: float = 5e-4


def finetune(
    model: nn.Module, images: Images, forget: Tensor, request: BaselineRequest, settings: FinetuneSettings
) -> Result:
    t = Training(model, images, forget, request, settings)
    for retained, _ in t.passes():
        t.step(cross_entropy(t.logits(retained), t.labels[retained]))
    return t.result()


METHOD = Method(
    "finetune",
    "Golatkar et al., CVPR 2020, arXiv 1911.04933",
    finetune,
    FinetuneSettings,
    ({"lr": 4e-2}, {"lr": 1e-1}, {"lr": 2e-2}),
)

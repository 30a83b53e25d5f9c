"""NegGrad+: descend on the retained images and ascend on the forgotten ones in each step.

Kurmanji et al., NeurIPS 2023 (arXiv 2302.09880), section 4: alpha CE(retained) - (1 - alpha) CE(forgotten), published with
alpha 0.95, SGD 0.01, 10 passes.  The ascent has no bound.
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
class NegGradSettings(Optimisation):
    """alpha: weight of the retained images, 0 to 1."""

    lr: float = 1e-2
    optimiser: str = "momentum"
    weight_decay: float = 5e-4
    alpha: float = 0.95


def neggrad(
    model: nn.Module, images: Images, forget: Tensor, request: BaselineRequest, settings: NegGradSettings
) -> Result:
    t = Training(model, images, forget, request, settings)
    for retained, forgotten in t.passes():
        kept = cross_entropy(t.logits(retained), t.labels[retained])
        lost = cross_entropy(t.logits(forgotten), t.labels[forgotten])
        t.step(settings.alpha * kept - (1 - settings.alpha) * lost)
    return t.result()


METHOD = Method(
    "neggrad+",
    "Kurmanji et al., NeurIPS 2023, arXiv 2302.09880",
    neggrad,
    NegGradSettings,
    ({"alpha": 0.99}, {"alpha": 0.9}, {"lr": 3e-3}, {"lr": 3e-2}, {"lr": 3e-3, "alpha": 0.99}),
)

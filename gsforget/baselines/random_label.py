"""Random relabelling: train on forgotten images under labels of retained classes, and on retained images under their own.

Graves et al., AAAI 2021 (arXiv 2010.10981), the relabelling that their "amnesiac unlearning" is compared with; as it is run
beside other methods since Chundawat et al., AAAI 2023: Adam 1e-4, 3 passes, batch 128, CE(forgotten, drawn labels) +
CE(retained).  Each forgotten image gets one label, drawn once.  The release draws from all classes but the forgotten one,
which with several forgotten classes still gives labels of forgotten ones; here labels are of retained classes only, each
as likely as any other.  The release shuffles both kinds into one batch, here each step has as many images of either.
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
class RandomLabelSettings(Optimisation):
    epochs: int = 3
    optimiser: str = "adam"
    weight_decay: float = 0.0
    cosine: bool = False


def random_label(
    model: nn.Module, images: Images, forget: Tensor, request: BaselineRequest, settings: RandomLabelSettings
) -> Result:
    t = Training(model, images, forget, request, settings)
    t.labels = t.labels.clone()
    t.labels[t.forgotten.to(t.device)] = t.wrong_labels(len(t.forgotten))
    for retained, forgotten in t.passes():
        kept, lost = (cross_entropy(t.logits(rows), t.labels[rows]) for rows in (retained, forgotten))
        t.step(kept + lost)
    return t.result()


METHOD = Method(
    "random-label",
    "Graves et al., AAAI 2021, arXiv 2010.10981",
    random_label,
    RandomLabelSettings,
    ({"epochs": 10}, {"lr": 3e-4}, {"lr": 3e-4, "epochs": 10}, {"lr": 1e-3, "epochs": 10}),
)

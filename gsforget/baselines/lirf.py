"""LIRF, learning with recoverable forgetting: drive the lower half of the network away from what it saw in forgotten images.

Ye et al., ECCV 2022 (arXiv 2207.08224), as the release of GS-LoRA (arXiv 2403.11530) runs it.  The model is cut in two; the
upper half stays as it is, a student of the lower half learns on forgotten images (1 - a) CE(drawn labels)
- 300 AT + 10 a T^2 KL(original || student, retained classes alone), and on retained ones 5 CE.  AT is the mean squared
difference of attention maps, the normalised energy of each position at the cut.  Published: 1e-4, AdamW, weight decay
0.05, batch 48, a 0.1, T 10, 100 passes.

The paper's deposit module, from which the forgotten classes can be brought back, is the opposite of erasing them.  It
shares no weights with the student and would be thrown away at the end, so it is not trained: the result is the same.

What differs from the release: the cut lies in the middle of any model; classes are told apart by their indices (the release
takes the first columns of the logits for the forgotten ones, whichever these are) and drawn labels are retained ones (in the
release below the number of forgotten classes); the energy is of positions, as in the attention transfer that it cites, and
not of channels, and small entries are not zeroed; the best state on test images is not kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy, normalize

from gsforget.baselines.base import BaselineRequest, Method, Result
from gsforget.baselines.inside import BlockTap, find_blocks
from gsforget.baselines.training import Optimisation, Training, distillation

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gsforget.views import Images


@dataclass(frozen=True)
class LIRFSettings(Optimisation):
    """
    Attributes:
        alpha, temperature: the a and T above.
        away, hold, replay: weights of AT, of the KL, of CE on retained images.
        cut: dotted name of the last module of the lower half; "" for the block in the middle.
    """

    epochs: int = 100
    batch_size: int = 48
    alpha: float = 0.1
    temperature: float = 10.0
    away: float = 300.0
    hold: float = 10.0
    replay: float = 5.0
    cut: str = ""


def attention(inside: Tensor) -> Tensor:
    """Energy of each position over its image's norm: tokens [B, N, d] or [B, H, W, d] -> [B, positions]."""
    return normalize(inside.square().mean(-1).flatten(1), dim=1)


def lirf(model: nn.Module, images: Images, forget: Tensor, request: BaselineRequest, settings: LIRFSettings) -> Result:
    t = Training(model, images, forget, request, settings)
    s, cut = settings, settings.cut or _middle(t)
    _freeze_above(t, cut)
    classes = t.labels[t.retained].unique()
    for retained, forgotten in t.passes():
        with BlockTap(t.original, [cut]) as theirs, BlockTap(t.model, [cut]) as ours:
            taught, logits = t.taught(forgotten), t.logits(forgotten)
            apart = (attention(ours.outputs[cut]) - attention(theirs.outputs[cut])).square().mean()
        wrong = cross_entropy(logits, t.wrong_labels(len(forgotten)))
        held = distillation(logits[:, classes], taught[:, classes], s.temperature)
        kept = cross_entropy(t.logits(retained), t.labels[retained])
        t.step((1 - s.alpha) * wrong - s.away * apart + s.hold * s.alpha * held + s.replay * kept)
    return t.result()


def _middle(t: Training) -> str:
    blocks = find_blocks(t.model, t.pixels(t.retained[:2]))
    return blocks[(len(blocks) - 1) // 2]


def _freeze_above(t: Training, cut: str) -> None:
    """Only weights that the output at the cut depends on train."""
    weights = [p for p in t.model.parameters() if p.requires_grad]
    with BlockTap(t.model, [cut]) as tap:
        t.logits(t.retained[:2])
    below = torch.autograd.grad(tap.outputs[cut].sum(), weights, allow_unused=True)
    for weight, gradient in zip(weights, below):
        weight.requires_grad_(gradient is not None)


METHOD = Method(
    "lirf",
    "Ye et al., ECCV 2022, arXiv 2207.08224",
    lirf,
    LIRFSettings,
    ({"lr": 3e-4}, {"lr": 1e-3}, {"away": 30.0, "lr": 3e-4}, {"hold": 1.0, "lr": 3e-4}, {"hold": 0.0, "lr": 3e-4}),
)

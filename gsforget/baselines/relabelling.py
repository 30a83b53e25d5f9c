"""How the continual-learning baselines of GS-LoRA's release (arXiv 2403.11530, 2501.09705) forget: wrong labels, and rehearsal.

They are methods against forgetting.  The release turns them round: images to forget get random wrong labels as a task to
learn, and what a method does for old tasks it does for the retained images.  The classifier is frozen.  Numbers are those
of its script for ImageNet100 (run_cl_forget_image.sh): AdamW, a cosine, 100 passes, batches of 48.

What differs from the release in all of them, and why:

- Wrong labels are retained classes, drawn anew at each visit.  The release draws from all classes but the image's own, so
  that images to forget also learn the names of other classes that are to be forgotten, or were forgotten before.
- A pass goes over the retained images, with as many to forget beside them.  Some released loops pass over the images to
  forget alone, others over a mixture.
- Dropout is off, the cosine ends at 0, the last weights are the result; the release keeps those with the best test figures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gsforget.baselines.base import BaselineRequest, Result
from gsforget.baselines.gradients import trained_weights
from gsforget.baselines.training import Optimisation, Training

if TYPE_CHECKING:
    from gsforget.views import Images


@dataclass(frozen=True)
class Relabelling(Optimisation):
    epochs: int = 100
    batch_size: int = 48
    head: bool = False


@dataclass(frozen=True)
class Anchored(Relabelling):
    """strength: weight of the penalty; images: that importances are estimated on at most, as each needs its own gradient."""

    strength: float = 0.05
    images: int = 512


def anchored(
    model: nn.Module,
    images: Images,
    forget: Tensor,
    request: BaselineRequest,
    settings: Anchored,
    importance: Callable[[Training], dict[str, Tensor]],
) -> Result:
    """CE(images of both sides, forgotten ones with wrong labels) + strength sum_i importance_i (w_i - w_i before)^2.

    Args:
        importance: one number per trained weight, by parameter name and in its shape.
    """
    t = Training(model, images, forget, request, settings)
    trained = trained_weights(t.model)
    before = {n: p.detach().clone() for n, p in trained.items()}
    weights = importance(t)
    for retained, forgotten in t.passes():
        labels = torch.cat([t.labels[retained], t.wrong_labels(len(forgotten))])
        loss = cross_entropy(t.logits(torch.cat([retained, forgotten])), labels)
        penalty = torch.stack([(weights[n] * (p - before[n]).square()).sum() for n, p in trained.items()]).sum()
        t.step(loss + settings.strength * penalty)
    return t.result()


def for_importances(t: Training) -> Tensor:
    """Rows of the retained images that importances are estimated on: all, or as many as the settings allow."""
    assert isinstance(t.settings, Anchored)
    most = t.settings.images
    return t.retained if len(t.retained) <= most else t.draw("retain", most)

"""Stand-ins for retained classes without images: what the model itself takes for them.

Blends of the images that are there are shown to the model before the request.  Those that it is readiest to take for a
class are then changed, by gradient, until it does so under any small move; without the moves, what comes out would be
noise that fools this one network (the inversion of DeepDream and DeepInversion, arXiv 1912.08795, with moves in the place
of priors).  Stand-ins are kept in memory only, and never shown or written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gsforget.lora.blocks import as_logits
from gsforget.views import Given, Images, Views, moved, random_moves

PER_CLASS, IN_ALL, BYTES = 60, 2000, 2**28  # stand-ins at most, and the memory that they may take
BLENDS = 4000  # candidates that the model is shown
STEPS, STEP = 20, 0.05  # of the change; the step as Adam's, in units of the normalised pixels
MILD = 0.5  # strength of the moves meanwhile
BATCH = 256


def stand_ins(
    model: nn.Module, images: Images, rows: Tensor, classes: Sequence[int], gone: Sequence[int], rng: torch.Generator
) -> Given:
    """Images of classes that have none.

    Args:
        model: logits from images, frozen, in eval mode.
        rows: int64, images to start from.
        classes: to make images of; gone: classes to forget now or forgotten earlier, whose answers do not count.

    Returns:
        As many of each class, labelled so.
    """
    device = next(model.parameters()).device
    blends = Views(_Blends(images, rows, rng), torch.arange(BLENDS), rng)
    said = torch.cat([_logits(model, blends.batch(i).to(device)) for i in torch.arange(BLENDS).split(BATCH)])
    said[:, list(gone)] = -torch.inf
    likely = said.log_softmax(1)
    most = min(IN_ALL, BYTES // blends.batch(torch.zeros(1, dtype=torch.int64)).nbytes)
    each = max(1, min(PER_CLASS, most // len(classes)))
    chosen = torch.cat([likely[:, k].topk(each).indices for k in classes])
    labels = torch.tensor(classes).repeat_interleave(each)
    pixels = [_drawn_to(model, blends.batch(at).to(device), to.to(device), rng).cpu()
              for at, to in zip(chosen.split(BATCH), labels.split(BATCH))]  # fmt: skip
    return Given(torch.cat(pixels), labels)


class _Blends:
    """Every image one of `rows`, with up to half of another one in it; labelled as the first."""

    def __init__(self, images: Images, rows: Tensor, rng: torch.Generator):
        self.images = images
        self.first, self.second = (rows[torch.randint(len(rows), (BLENDS,), generator=rng)] for _ in range(2))
        self.share = 0.5 + 0.5 * torch.rand(BLENDS, generator=rng)
        self.labels = images.labels[self.first]

    def batch(self, indices: Tensor) -> Tensor:
        second, first = (self.images.batch(of[indices]) for of in (self.second, self.first))
        return torch.lerp(second, first, self.share[indices].view(-1, 1, 1, 1))


def _drawn_to(model: nn.Module, start: Tensor, labels: Tensor, rng: torch.Generator) -> Tensor:
    """Images [B, C, H, W] changed towards classes int64 [B], within the range of values that they have."""
    low, high = start.min(), start.max()
    pixels = start.clone().requires_grad_(True)
    adam = torch.optim.Adam([pixels], STEP)
    for _ in range(STEPS):
        adam.zero_grad()
        seen = as_logits(model(moved(pixels, random_moves(len(pixels), rng, MILD)))).float()
        # A sum, so that an image's step does not depend on which others share its batch.
        cross_entropy(seen, labels, reduction="sum").backward()
        adam.step()
        with torch.no_grad():
            pixels.clamp_(low, high)
    return pixels.detach()


@torch.no_grad()
def _logits(model: nn.Module, pixels: Tensor) -> Tensor:
    return as_logits(model(pixels)).float().cpu()

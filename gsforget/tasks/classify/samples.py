"""Closed-set image classification: forget single images while their classes are retained.

A model that never saw an image would answer it as it answers held-out images of the same class.  So within each class
the listed images are taught the losses of held-out images, rank by rank: the image that the model was surest of gets the
loss of the held-out image that it was surest of, and so on.  Each keeps its own confusions: only the probability of the
true class is moved, the others share the rest as before.  No image is pushed away from its class, for an image that the
model is suspiciously wrong about is as recognisable as one that it remembers.  All other images keep their answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gsforget.control import NOISE
from gsforget.lora.blocks import FeedForward, find_feed_forward
from gsforget.tasks.base import Losses, Reader, Score, Seen
from gsforget.tasks.classify.answers import correct, logits_reader, score
from gsforget.there import places, there

SMALLEST = 1e-6  # probability left to the other classes together, and to the true one


@dataclass(frozen=True)
class SingleImages:
    """One request.

    Attributes:
        held_out: logits [M, K] of the model before the request on images that it never saw, of the classes concerned.
        held_out_labels: int64 [M]; every class of a listed image must occur.
        erased: class indices forgotten by earlier requests; they stay out of every target.
    """

    held_out: Tensor
    held_out_labels: Tensor
    erased: tuple[int, ...] = ()
    name: str = "classify"

    def networks(self, model: nn.Module, example: Tensor) -> list[FeedForward]:
        return find_feed_forward(model, example)

    def reader(self, model: nn.Module, example: Tensor) -> Reader:
        del example
        return logits_reader(model)

    def objective(self, before: Seen, labels: Tensor, forget: Tensor, train: Tensor) -> SingleImagesObjective:
        """Fix targets from the model before the request: its own answers, softened where `forget` (bool [N]) says so."""
        del train
        right = correct(before.outputs, labels)
        targets = self._masked(before.outputs)
        held = self._masked(self.held_out.to(targets.device))
        known = self.held_out_labels.to(targets.device)
        losses = held_out_levels(
            true_loss(targets[forget], labels[forget]), labels[forget], true_loss(held, known), known
        )
        targets[forget] = soften(targets[forget], labels[forget], losses)
        return SingleImagesObjective(targets, forget, labels, right)

    def _masked(self, outputs: Tensor) -> Tensor:
        masked = outputs.float().clone()
        masked[:, list(self.erased)] = -torch.inf
        return masked.softmax(1)


@dataclass(frozen=True)
class SingleImagesObjective:
    """Cross-entropy with fixed targets, probabilities [N, K]; forget is bool [N], as is right_before; labels int64 [N]."""

    targets: Tensor
    forget: Tensor
    labels: Tensor
    right_before: Tensor
    duel: None = None
    deepens: bool = False
    noise: float = NOISE

    def right(self, seen: Seen, rows: Tensor) -> Tensor:
        return correct(seen.outputs, self.labels[rows])

    def score(self, seen: Seen, rows: Tensor, shows: Tensor) -> Score:
        return score(self.right_before[rows], self.right(seen, rows), self.forget[rows], shows)

    def with_earlier(self, see: Callable[[], Seen], rows: Tensor, depth: float) -> None:
        del see, rows, depth

    def named(self, seen: Seen, rows: Tensor) -> None:
        del seen, rows

    @cached_property
    def _forget(self) -> Tensor:
        """`forget` on the host."""
        return self.forget.cpu()

    def losses(self, seen: Seen, rows: Tensor, depth: float = 1.0) -> Losses:
        del depth
        rows, device = rows.cpu(), seen.outputs.device
        forget = self._forget[rows]
        distance = cross_entropy(seen.outputs.float(), self.targets[there(rows, device)], reduction="none")
        retain, forgotten = _mean(distance[places(~forget, device)]), _mean(distance[places(forget, device)])
        return Losses(retain + forgotten, retain, forgotten)


def true_loss(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Loss of the true class in nats, [N, K] and int64 [N] -> [N]; finite."""
    return -probabilities.gather(1, labels[:, None])[:, 0].clamp_min(SMALLEST).log()


def held_out_levels(losses: Tensor, labels: Tensor, held: Tensor, held_labels: Tensor) -> Tensor:
    """The loss that each image should have: within its class, that of the held-out images at the same rank, [N].

    Ranks are matched as quantiles (rank + 1/2) / N, with linear interpolation between held-out losses.
    """
    wanted = losses.clone()
    for k in labels.unique().tolist():
        here = torch.nonzero(labels == k).flatten()
        order = losses[here].argsort(stable=True)
        levels = held[held_labels == k].sort().values
        at = (torch.arange(len(here), device=losses.device) + 0.5) / len(here)
        place = (at * len(levels) - 0.5).clamp(0, len(levels) - 1)
        low = place.floor().long()
        high = (low + 1).clamp_max(len(levels) - 1)
        wanted[here[order]] = torch.lerp(levels[low], levels[high], (place - low).to(levels.dtype))
    return wanted


def soften(probabilities: Tensor, labels: Tensor, losses: Tensor) -> Tensor:
    """Answers with the given losses of the true class: [N, K], int64 [N], [N] -> [N, K].

    The other classes keep their proportions; where nothing is left of them, they share equally.
    """
    truth = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(1, labels[:, None], True)
    others = torch.where(truth, torch.zeros_like(probabilities), probabilities)
    left = others.sum(1, keepdim=True)
    equal = (~truth).to(probabilities.dtype) / (probabilities.shape[1] - 1)
    shares = torch.where(left > SMALLEST, others / left.clamp_min(SMALLEST), equal)
    true = (-losses).exp().clamp(SMALLEST, 1 - SMALLEST)[:, None]
    return torch.where(truth, true.expand_as(probabilities), (1 - true) * shares)


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(1, values.numel())

"""How soon a model learns the forgotten classes again, and what lies between it and the original.

Relearning is fine-tuning under one fixed setting: AdamW with betas 0.9 and 0.999, no weight decay, a constant step size,
cross-entropy, seeded batches, the model in evaluation mode (no dropout, fixed statistics).  A count of steps means
nothing alone; the same attack on the original takes 0 steps, and on a model that never saw the classes it takes the
number to compare with.  Three attacks: ``head`` trains the classifier on frozen features, ``full`` all weights (from two
starts, see `Starts`), both on images that the attacker holds of the forgotten classes (and, best, as many retained ones,
or every image is soon called forgotten); ``retain`` is ``full`` on retained images alone, and asks whether the classes
come back by themselves (arXiv 2505.22310).  Nothing here changes the model it is given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gsforget.lora.blocks import as_logits

if TYPE_CHECKING:
    Value = TypeVar("Value")

HEAD_LR = 1e-2
FULL_LRS = (3e-4, 1e-4, 3e-5, 1e-5)  # for all weights: the first that the network bears, see `attacked.step_size`
BATCH = 64
FAR = 10.0  # nats between a row's bias and the median beyond which an attacker starts from the median instead
Mode = Literal["head", "full", "retain"]


@dataclass(frozen=True)
class Curve:
    """Accuracy in percent on the forgotten classes' test images after each of these numbers of optimiser steps."""

    steps: tuple[int, ...]
    accuracies: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def steps_to(curve: Curve, accuracy: float) -> int | None:
    """First measured number of steps at which the accuracy, in percent, is reached; None where it never is.

    Between measurements nothing is interpolated, so the answer may be late by the distance of two measurements.  Where
    the accuracy is there before any step (the original model), it is 0.
    """
    return next((s for s, a in zip(curve.steps, curve.accuracies) if a >= accuracy), None)


@dataclass(frozen=True)
class Starts:
    """Relearning of one model from two starts: the head as it is, and the forgotten rows imprinted with class means.

    An attacker takes what serves better: a head whose unused rows collapsed, as those of a model that never saw the
    classes do, is slow to train whatever the features know.
    """

    own: Curve
    imprinted: Curve

    @property
    def best(self) -> float:
        """The highest accuracy reached from either start, percent."""
        return max(*self.own.accuracies, *self.imprinted.accuracies)

    def faster(self, accuracy: float) -> Curve:
        """The curve that reaches the accuracy first; the own one where both need no step, else the imprinted one."""
        own, imprinted = steps_to(self.own, accuracy), steps_to(self.imprinted, accuracy)
        takes_own = own is not None and (imprinted is None or own < imprinted or own == 0)
        return self.own if takes_own else self.imprinted


def relearn(
    model: nn.Module,
    classifier: str,
    batch_of: Callable[[Tensor], Tensor],
    rows: Tensor,
    labels: Tensor,
    evaluate: Callable[[nn.Module], float],
    mode: Mode = "full",
    steps: int = 100,
    every: int | Sequence[int] = 10,
    lr: float | None = None,
    batch_size: int = BATCH,
    seed: int = 0,
    until: float | None = None,
) -> Curve:
    """Fine-tune a copy of the model and watch the forgotten classes.

    Args:
        model: on its device; not changed.
        classifier: dotted name of its last linear layer (`features.find_classifier`).
        batch_of: row numbers int64 [B] -> images float32 [B, C, H, W].
        rows: int64 [M], the images to train on; labels: int64 [N] of all rows, so that labels[rows] belong to them.
        evaluate: (model) -> accuracy in percent on the forgotten classes' test images.
        mode: ``head``, ``full`` or ``retain``; the last differs from ``full`` only in the rows that the caller gives.
        every: measure after every so many steps, or after these numbers of steps; always before the first and after
            the last.
        lr: None: 1e-2 for the head, 3e-4 for all weights, which large networks do not bear.
        until: stop at the first measurement of at least this percentage.

    Raises:
        ValueError: no rows, no steps, or an unknown mode.
    """
    if mode not in ("head", "full", "retain"):
        raise ValueError(f"mode must be head, full or retain, not {mode!r}")
    batches = endless_batches(rows.cpu(), batch_size, seed)
    subject = copy.deepcopy(model).eval()
    device = next(subject.parameters()).device
    head = subject.get_submodule(classifier)
    truth = labels.to(device)
    if mode == "head":
        from gsforget.features import features_and_logits

        chosen = [features_and_logits(subject, classifier, batch_of(r).to(device))[0] for r in rows.cpu().split(256)]
        cached, place = torch.cat(chosen), torch.empty(int(rows.max()) + 1, dtype=torch.int64)
        place[rows.cpu()] = torch.arange(len(rows))

        def loss(batch: Tensor) -> Tensor:
            return cross_entropy(head(cached[place[batch].to(device)]).float(), truth[batch.to(device)])
    else:

        def loss(batch: Tensor) -> Tensor:
            return cross_entropy(as_logits(subject(batch_of(batch).to(device))).float(), truth[batch.to(device)])

    trained = list((head if mode == "head" else subject).parameters())
    for p in subject.parameters():
        p.requires_grad_(False)
    rate = lr if lr is not None else (HEAD_LR if mode == "head" else FULL_LRS[0])
    first = _measured(evaluate, subject)  # the model as it is; then what no attacker would leave in place is mended
    _mend(head)
    return fine_tune(trained, loss, batches, lambda: _measured(evaluate, subject), first, steps, every, rate, until)


def relearn_head(
    weight: Tensor,
    bias: Tensor | None,
    features: Tensor,
    labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    steps: int = 100,
    every: int | Sequence[int] = 10,
    lr: float = HEAD_LR,
    batch_size: int = BATCH,
    seed: int = 0,
    until: float | None = None,
) -> Curve:
    """``relearn`` in mode ``head`` on features that are known already; no model is run.

    Args:
        weight, bias: the head, [K, d] and [K] or None; not changed.
        features, labels: [M, d], int64 [M], the images to train on.
        test_features, test_labels: [N, d], int64 [N], test images of the forgotten classes.
    """
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device)
    with torch.no_grad():
        head.weight.copy_(weight)
        if bias is not None:
            head.bias.copy_(bias)

    @torch.no_grad()
    def right() -> float:
        return float(100 * (head(test_features.float()).argmax(1) == test_labels).float().mean())

    def loss(batch: Tensor) -> Tensor:
        chosen = batch.to(features.device)
        return cross_entropy(head(features[chosen].float()), labels[chosen])

    first = right()
    _mend(head)
    batches = endless_batches(torch.arange(len(features)), batch_size, seed)
    return fine_tune(list(head.parameters()), loss, batches, right, first, steps, every, lr, until)


def interpolation(
    model: nn.Module,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    evaluate: Callable[[nn.Module], Value],
    points: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
) -> list[tuple[float, Value]]:
    """What ``evaluate`` says along before + t (after - before), for each t; the model's own state is put back.

    A forgotten class that is back after a short way is only just hidden.  At t = 0 and 1 the states are exact; buffers
    that are not floating point (counters) are those of the nearer end.

    Raises ValueError where the states do not hold the same tensors.
    """
    if before.keys() != after.keys() or any(before[k].shape != after[k].shape for k in before):
        raise ValueError("the two states do not hold the same tensors")
    own = {k: v.detach().clone() for k, v in model.state_dict().items()}
    try:
        found = []
        for t in points:
            model.load_state_dict({k: _between(before[k], after[k], t) for k in before})
            found.append((float(t), evaluate(model)))
        return found
    finally:
        model.load_state_dict(own)


def _between(before: Tensor, after: Tensor, t: float) -> Tensor:
    if t in (0, 1) or not before.is_floating_point():
        return after if t >= 0.5 else before
    return before + t * (after.to(before.device) - before)


def fine_tune(
    parameters: list[nn.Parameter],
    loss: Callable[[Tensor], Tensor],
    batches: Iterator[Tensor],
    measure: Callable[[], float],
    first: float,
    steps: int,
    every: int | Sequence[int],
    lr: float,
    until: float | None,
) -> Curve:
    """Train parameters by AdamW, as every attack here does, and measure on the way.

    Args:
        loss: of a batch of row numbers, from `batches`; measure: percent, after some of the steps; first: before any.
        steps, every, until: as for `relearn`.
    """
    if steps < 1:
        raise ValueError(f"relearning needs at least one step, got {steps}")
    when = set(range(0, steps, every)) if isinstance(every, int) else set(every)
    when.add(steps)
    for p in parameters:
        p.requires_grad_(True)
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), weight_decay=0.0)
    curve = [(0, first)]
    for step in range(1, steps + 1):
        if until is not None and curve[-1][1] >= until:
            break
        with torch.enable_grad():
            optimiser.zero_grad()
            loss(next(batches)).backward()
        optimiser.step()
        if step in when:
            curve.append((step, measure()))
    return Curve(tuple(s for s, _ in curve), tuple(a for _, a in curve))


def _measured(evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    with torch.no_grad():
        value = float(evaluate(model))
    model.eval()
    return value


def endless_batches(rows: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Batches of row numbers for ever: seeded permutations, one after the other."""
    if not len(rows):
        raise ValueError("there are no images to relearn from")
    generator = torch.Generator().manual_seed(seed)

    def endless() -> Iterator[Tensor]:
        while True:
            yield from rows[torch.randperm(len(rows), generator=generator)].split(batch_size)

    return endless()


@torch.no_grad()
def _mend(head: nn.Module) -> None:
    """Undo what masks a row of the head without any work: weights that are not finite, and biases out of all range."""
    weight, bias = head.weight, getattr(head, "bias", None)
    if bias is not None:
        sane = bias[bias.isfinite()]
        median = sane.median() if len(sane) else torch.zeros_like(bias[0])
        bias.copy_(torch.where(bias.isfinite() & ((bias - median).abs() <= FAR), bias, median))
    weight.copy_(torch.where(weight.isfinite(), weight, torch.zeros_like(weight)))

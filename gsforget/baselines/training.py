"""What most baselines share: a copy of the model whose weights train, and the images of a request in batches.

A pass goes once over the retained images; batches of forgotten ones are cycled through beside it.  Images of classes that
earlier requests forgot are never shown.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from gsforget.baselines.base import BaselineRequest, Result, plain_state
from gsforget.errors import GsforgetError, RequestError
from gsforget.features import FeatureTap, features_and_logits, find_classifier
from gsforget.lora.blocks import as_logits
from gsforget.rounds import Rounds

if TYPE_CHECKING:
    from gsforget.views import Images

EVAL_BATCH = 256


@dataclass(frozen=True)
class Optimisation:
    """How a baseline trains.

    Attributes:
        lr: step size at the start.
        epochs: passes over the retained images, never more than the request allows.
        batch_size: retained images per step, and at most as many forgotten ones.
        optimiser: as timm names it: momentum (plain SGD with it; its "sgd" is Nesterov's), adam, adamw, …
        weight_decay, momentum: of the optimiser; momentum of the first alone.
        cosine: whether the step size falls to zero along a cosine, from step to step.
        head: whether the classifier trains too.
    """

    lr: float = 1e-4
    epochs: int = 10
    batch_size: int = 128
    optimiser: str = "adamw"
    weight_decay: float = 0.05
    momentum: float = 0.9
    cosine: bool = True
    head: bool = True


class Training:
    """One request's training of all weights.

    Args:
        model, images, forget, request: as for `base.Baseline`; the model itself is left as it is.
        fresh: start from weights drawn anew instead of the model's.

    Attributes:
        model: the copy that trains, in eval mode, so that dropout is off.
        retained, forgotten: int64, rows of the images on each side.
        labels: int64 [N] on the model's device.
        rng: what all draws of the method come from.

    Raises RequestError: kind ``no_images`` where one of the two sides has none.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        forget: Tensor,
        request: BaselineRequest,
        settings: Optimisation,
        fresh: bool = False,
    ):
        from timm.optim import create_optimizer_v2

        self.start = time.perf_counter()
        self.original, self.images, self.request, self.settings = model, images, request, settings
        self.device = next(model.parameters()).device
        self.labels = images.labels.to(self.device)
        erased = torch.isin(images.labels, torch.tensor(request.erased, dtype=torch.int64))
        self.retained, self.forgotten = (torch.nonzero(m).flatten() for m in (~forget.cpu() & ~erased, forget.cpu()))
        if not len(self.retained) or not len(self.forgotten):
            side = "retain" if not len(self.retained) else "forget"
            raise RequestError(f"There are no images to {side}.", "Give images of both sides.", "no_images")
        self.rng = torch.Generator().manual_seed(request.seed)
        self.classifier = find_classifier(model.eval(), self.pixels(self.retained[:2]))
        self.model = copy.deepcopy(model).eval().requires_grad_(True)
        if fresh:
            draw_anew(self.model, request.seed)
        self.model.get_submodule(self.classifier).requires_grad_(settings.head)
        self.epochs = min(settings.epochs, request.epochs)
        self.per_epoch = math.ceil(len(self.retained) / settings.batch_size)
        self.steps, self.total = 0, max(1, self.epochs * self.per_epoch)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = create_optimizer_v2(
            trained, settings.optimiser, settings.lr, settings.weight_decay, settings.momentum
        )
        self._rounds = Rounds({"retain": self.retained, "forget": self.forgotten}, self.rng)
        self._history: list[dict[str, Any]] = []
        self._sums: list[float] = []

    def pixels(self, rows: Tensor) -> Tensor:
        """Images, float32 [B, C, H, W]."""
        return self.images.batch(rows).to(self.device)

    @torch.no_grad()
    def taught(self, rows: Tensor, teacher: nn.Module | None = None) -> Tensor:
        """Logits [B, K] of the model before the request, or of another one, without gradients."""
        return self.logits(rows, teacher or self.original)

    def logits(self, rows: Tensor, model: nn.Module | None = None) -> Tensor:
        """Logits [B, K] of the model in training, or of another one."""
        return as_logits((model or self.model)(self.pixels(rows))).float()

    def features_and_logits(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Penultimate features [B, d] and logits [B, K] of the model in training, with gradients."""
        with FeatureTap(self.model, self.classifier) as tap:
            logits = self.logits(rows)
        return tap.features.float(), logits

    def before(self) -> tuple[Tensor, Tensor]:
        """Features [N, d] and logits [N, K] of all images by the model before the request."""
        pieces = [
            features_and_logits(self.original, self.classifier, self.pixels(rows))
            for rows in torch.arange(len(self.labels)).split(EVAL_BATCH)
        ]
        features, logits = (torch.cat(p) for p in zip(*pieces))
        return features, logits

    def draw(self, side: str, count: int) -> Tensor:
        """The next rows of "retain" or "forget", each once per round, in a fresh order in every round."""
        return self._rounds.draw(side, count)

    def passes(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows to retain and rows to forget of each step; an entry of the history after each pass."""
        size = self.settings.batch_size
        for epoch in range(self.epochs):
            for rows in self._rounds.shuffled(self.retained).split(size):
                yield rows, self.draw("forget", min(len(rows), len(self.forgotten)))
            self._history.append({"epoch": epoch, "loss": sum(self._sums) / max(1, len(self._sums))})
            self._sums = []

    def step(self, loss: Tensor) -> None:
        """Follow the gradient of a loss, a scalar.  Raises GsforgetError ``diverged``."""
        self.optimiser.zero_grad()
        loss.backward()
        self.follow(loss.item())

    def follow(self, loss: float) -> None:
        """Follow the gradients that are there; `loss` is what the history tells."""
        if not math.isfinite(loss):
            raise GsforgetError(f"Training diverged (the loss is {loss}).", "Lower its step size.", "diverged")
        if self.settings.cosine:
            share = (1 + math.cos(math.pi * min(1.0, self.steps / self.total))) / 2
            for group in self.optimiser.param_groups:
                group["lr"] = self.settings.lr * share
        self.optimiser.step()
        self.steps += 1
        self._sums.append(loss)

    def wrong_labels(self, count: int) -> Tensor:
        """Labels of retained classes, drawn evenly, int64 [count]."""
        classes = self.labels[self.retained].unique()
        return classes[torch.randint(len(classes), (count,), generator=self.rng).to(self.device)]

    def result(self) -> Result:
        return Result(plain_state(self.model), time.perf_counter() - self.start, history=self._history)


def distillation(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 times `softened`, whose gradient is of the same size at every temperature."""
    return temperature**2 * softened(logits, target, temperature)


def softened(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """KL(softmax(target / T) || softmax(logits / T)) in nats, a mean over images; logits and target [B, K]."""
    ours, theirs = log_softmax(logits / temperature, 1), log_softmax(target / temperature, 1)
    return kl_div(ours, theirs, reduction="batchmean", log_target=True)


def draw_anew(model: nn.Module, seed: int) -> None:
    """Random weights: by the model's own rule where it has one (timm), else by that of each layer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        own = getattr(model, "init_weights", None)
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        if own is not None:
            own()

"""The training loops of GS-LoRA (arXiv 2403.11530) and GS-LoRA++ (arXiv 2501.09705) as their authors published them.

Written anew from the papers and from the released script for a chain of requests on ImageNet100, as a rival to measure
beside; gsforget's own loop is `gsforget.training`.  The loss of a step is

    CE(retained) + beta ReLU(BND - CE(forgotten)) + alpha sum_g ||factors of group g||
        + w_f ReLU(BND_pro - KL(forgotten)) + w_r KL(retained),        the second line in GS-LoRA++ only,

where each CE and KL is a mean over the step's images, KL is KL(softmax(prototype of the image's class) || softmax(feature)),
prototypes are class means of penultimate features, and the norms are of the raw factors, without LoRA's scale.  AdamW
follows the subgradient, so norms get small but never zero.

What differs from the release, and why:

- Prototypes are class means of the model as it stands before the request, weights loaded (one released script takes them
  from random weights).  They come from all images that are given, without the augmentation that the release never applies.
- The last weights are the result.  The release keeps the checkpoint with the best H on the test images.
- Averaged weights are the result where `ema_epoch` asks for them, and are not computed otherwise.  In the release they are
  evaluated and then dropped, and in a chain of requests they equal the model before training.
- Groups are all feed-forward networks that the model has; the release lists 6 or 12 by name.
- LoRA lies over a frozen model and is merged once, at the end; the release merges and unmerges at each evaluation.
- Retained and forgotten images of a step pass through the model together, which changes nothing in a model whose images
  do not see each other, and dropout is off (the networks measured here have none).
- Evaluation never sees the true label (released face models subtract a margin from it); the losses do, as in training.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, linear, log_softmax

from gsforget.baselines.base import BaselineRequest, Method, Result, frozen, plain_state
from gsforget.errors import GsforgetError, RequestError
from gsforget.features import FeatureTap, features_and_logits, find_classifier
from gsforget.lora.blocks import as_logits, find_feed_forward
from gsforget.lora.groups import LoRAGroups, LoRAPair

if TYPE_CHECKING:
    from gsforget.views import Images

EVAL_BATCH = 256


@dataclass(frozen=True)
class PublishedSettings:
    """Numbers of the released ImageNet100 script (run_cl_forget_image.sh) and, where it is silent, of its defaults (args.py).

    Attributes:
        lr, min_lr: of AdamW, at the first epoch and where the cosine ends; script.
        weight_decay: decoupled; args.py (Adam's other numbers are torch's, as there).
        rank, lora_alpha: scale of the product is lora_alpha / rank = 1/8; script, and loralib's default.
        batch_size: retained images per step, and as many forgotten ones; script.
        alpha: strength of the group penalty from the first step on (the script has no warm-up).
        betas: weight of the ascent, by request; the last one holds for all further requests; script.
        bnd: bound of the ascent in nats; script (it was made for a cosine head and is no bound for a linear one).
        prototypes: GS-LoRA++; False is GS-LoRA.
        push, pull: w_f (script) and w_r (args.py), weights of the prototype terms.
        bnd_pro: bound of the push in nats; args.py.
        ema_epoch, ema_decay: from which epoch on the weights are averaged, and how slowly; the script's 30 and 0.9 never
            reach its result, so None, no average, is the default.
        slopes: kaiming_uniform's `a` for factor A, first request (loralib) and later ones (the release).
    """

    lr: float = 1e-2
    min_lr: float = 1e-5
    weight_decay: float = 0.05
    rank: int = 8
    lora_alpha: float = 1.0
    batch_size: int = 48
    alpha: float = 1e-4
    betas: tuple[float, ...] = (0.2, 0.25, 0.25, 0.25)
    bnd: float = 105.0
    prototypes: bool = True
    push: float = 0.05
    pull: float = 0.0
    bnd_pro: float = 18.0
    ema_epoch: int | None = None
    ema_decay: float = 0.9
    slopes: tuple[float, float] = (math.sqrt(5), math.sqrt(50))

    def beta(self, task: int) -> float:
        return self.betas[min(task, len(self.betas) - 1)]


class PublishedLosses(NamedTuple):
    """Terms of one step before their weights, scalars in nats, and `total`, all but the group penalty, weighted."""

    retain: Tensor
    ascent: Tensor
    push: Tensor
    pull: Tensor
    total: Tensor


def published_losses(
    logits: Tensor,
    features: Tensor,
    labels: Tensor,
    forget: Tensor,
    prototypes: Tensor,
    s: PublishedSettings,
    task: int,
) -> PublishedLosses:
    """Losses of a batch that holds retained and forgotten images.

    Args:
        logits, features, labels, forget: float [B, K], float [B, d], int64 [B], bool [B].
        prototypes: float [K, d].
    """
    retain = cross_entropy(logits[~forget], labels[~forget])
    ascent = (s.bnd - cross_entropy(logits[forget], labels[forget])).relu()
    total = retain + s.beta(task) * ascent
    push, pull = torch.zeros_like(retain), torch.zeros_like(retain)
    if s.prototypes:
        push = (s.bnd_pro - prototype_distance(features[forget], prototypes[labels[forget]])).relu()
        pull = prototype_distance(features[~forget], prototypes[labels[~forget]])
        total = total + s.push * push + s.pull * pull
    return PublishedLosses(retain, ascent, push, pull, total)


def prototype_distance(features: Tensor, prototypes: Tensor) -> Tensor:
    """Mean over images of KL(softmax(prototype) || softmax(feature)) in nats; both [B, d]."""
    return kl_div(log_softmax(features, 1), log_softmax(prototypes, 1), reduction="batchmean", log_target=True)


def penalty_gradient(flat: Tensor, lengths: list[int]) -> Tensor:
    """Subgradient of the sum of group norms, [n]: each group's factors over their norm, zero for a group that is zero."""
    pieces = flat.split(lengths)
    return torch.cat([p / norm if (norm := p.norm()) > 0 else torch.zeros_like(p) for p in pieces])


def cosine_lr(epoch: int, epochs: int, s: PublishedSettings) -> float:
    """The step size in an epoch, 0-based; it changes between epochs only, and would be `min_lr` after the last one."""
    return s.min_lr + (s.lr - s.min_lr) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean feature of each class: [N, d], int64 [N] -> [K, d]; zero for a class without images."""
    sums = features.new_zeros(num_classes, features.shape[1]).index_add_(0, labels, features)
    return sums / torch.bincount(labels, minlength=num_classes).clamp_min(1)[:, None]


def published_gs_lora(
    model: nn.Module,
    images: Images,
    forget: Tensor,
    request: BaselineRequest,
    settings: PublishedSettings | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> Result:
    """Forget by the published loop: GS-LoRA++, or GS-LoRA with ``PublishedSettings(prototypes=False)``.

    An epoch is one pass over the retained images; batches of forgotten ones are cycled through beside it.

    Args:
        progress: called with one dict of plain numbers per epoch.

    Raises:
        RequestError: no images on one of the two sides, or a model without feed-forward networks or linear classifier.
        GsforgetError: kind ``diverged``.
    """
    settings = settings or PublishedSettings()
    with frozen(model):
        loop = _Loop(model, images, forget, request, settings)
        try:
            return loop.run(progress or (lambda _event: None))
        finally:
            loop.detach()


class _Loop:
    """One request's training over a frozen model."""

    def __init__(
        self, model: nn.Module, images: Images, forget: Tensor, request: BaselineRequest, settings: PublishedSettings
    ):
        self.model, self.images, self.request, self.settings = model, images, request, settings
        self.device = next(model.parameters()).device
        self.labels, self.forget = images.labels.to(self.device), forget.to(self.device)
        erased = torch.isin(images.labels, torch.tensor(request.erased, dtype=torch.int64))
        here = forget.cpu()
        self.retained, self.forgotten = (torch.nonzero(m).flatten() for m in (~here & ~erased, here))
        if not len(self.retained) or not len(self.forgotten):
            side = "retain" if not len(self.retained) else "forget"
            raise RequestError(f"There are no images to {side}.", "The published loop needs both sides.", "no_images")
        self.rng = torch.Generator().manual_seed(request.seed)
        example = self._images(torch.arange(min(2, len(self.labels))))
        self.classifier = find_classifier(model, example)
        self.groups = LoRAGroups(model, find_feed_forward(model, example), settings.rank, request.seed)
        self.groups.detach()  # its hooks have scale 1; those of `attach` have the published one
        self.scale = settings.lora_alpha / settings.rank
        self.handles: list[Any] = []
        self.lengths = self.groups.lengths.tolist()

    def run(self, progress: Callable[[dict[str, Any]], None]) -> Result:
        start = time.perf_counter()
        self.prototypes = self._prototypes() if self.settings.prototypes else torch.empty(0, device=self.device)
        self._draw_factors()
        self.attach()
        flat = self.groups.flat
        flat.grad = self.groups.grad
        optimiser = torch.optim.AdamW([flat], self.settings.lr, weight_decay=self.settings.weight_decay)
        history: list[dict[str, Any]] = []
        averaged: dict[str, Tensor] = {}
        for epoch in range(self.request.epochs):
            for group in optimiser.param_groups:
                group["lr"] = cosine_lr(epoch, self.request.epochs, self.settings)
            history.append({"epoch": epoch, **self._epoch(optimiser)})
            progress(history[-1])
            if self.settings.ema_epoch is not None and epoch >= self.settings.ema_epoch:
                averaged = self._average(averaged)
        deltas = averaged or self._deltas()
        state = plain_state(self.model)
        for name, delta in deltas.items():
            state[name] += delta.cpu()
        return Result(
            state,
            time.perf_counter() - start,
            self.groups.norms().tolist(),
            [block.name for block in self.groups.blocks],
            history,
        )

    def _epoch(self, optimiser: torch.optim.Optimizer) -> dict[str, float]:
        """One pass over the retained images; mean losses."""
        retained = self._batches(self.retained)
        forgotten: Iterator[Tensor] = iter(())
        sums: dict[str, float] = {}
        for rows in retained:
            other = next(forgotten, None)
            if other is None:
                forgotten = iter(self._batches(self.forgotten))
                other = next(forgotten)
            losses = self._step(torch.cat([rows, other]), optimiser)
            for name, value in losses._asdict().items():
                sums[name] = sums.get(name, 0.0) + value.item() / len(retained)
        if not all(math.isfinite(value) for value in sums.values()):
            raise GsforgetError(
                f"The published loop diverged (mean losses {sums}).", "Lower its step size: lr.", "diverged"
            )
        return {**sums, "penalty": self.groups.norms().sum().item()}

    def _step(self, rows: Tensor, optimiser: torch.optim.Optimizer) -> PublishedLosses:
        here = rows.to(self.device)
        with FeatureTap(self.model, self.classifier) as tap:
            logits = as_logits(self.model(self._images(rows))).float()
        head = self.model.get_submodule(self.classifier)
        if hasattr(head, "margin_logits"):  # of a face model: trained with its margin, evaluated without
            logits = head.margin_logits(tap.features, self.labels[here]).float()
        losses = published_losses(
            logits,
            tap.features.float(),
            self.labels[here],
            self.forget[here],
            self.prototypes,
            self.settings,
            self.request.task,
        )
        self.groups.grad.zero_()
        losses.total.backward()
        self.groups.grad.add_(penalty_gradient(self.groups.flat, self.lengths), alpha=self.settings.alpha)
        optimiser.step()
        return PublishedLosses(*(term.detach() for term in losses))

    def _batches(self, pool: Tensor) -> tuple[Tensor, ...]:
        """A pool in a fresh order, the last batch as small as it comes."""
        return pool[torch.randperm(len(pool), generator=self.rng)].split(self.settings.batch_size)

    def _images(self, rows: Tensor) -> Tensor:
        return self.images.batch(rows).to(self.device)

    def _prototypes(self) -> Tensor:
        """Class means of the frozen model's features over the images of this request, [K, d]."""
        rows = torch.cat([self.retained, self.forgotten])
        features = [
            features_and_logits(self.model, self.classifier, self._images(r))[0] for r in rows.split(EVAL_BATCH)
        ]
        return class_means(torch.cat(features), self.labels[rows.to(self.device)], self.request.num_classes)

    def _draw_factors(self) -> None:
        """A from kaiming_uniform with the request's slope, drawn on the CPU; B zero."""
        slope = self.settings.slopes[min(self.request.task, 1)]
        for pair in self.groups.pairs:
            bound = math.sqrt(6 / ((1 + slope**2) * pair.module.in_features))
            pair.a.data.copy_(torch.empty(pair.a.shape).uniform_(-bound, bound, generator=self.rng))
            pair.b.data.zero_()

    def attach(self) -> None:
        """Add each pair's scaled product to its layer's output."""
        self.handles = [p.module.register_forward_hook(_scaled(p, self.scale)) for p in self.groups.pairs]

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _deltas(self) -> dict[str, Tensor]:
        return {pair.parameter: self.scale * pair.delta() for pair in self.groups.pairs}

    def _average(self, averaged: dict[str, Tensor]) -> dict[str, Tensor]:
        """The running average of the merged weights, as what it adds to the frozen ones."""
        now, decay = self._deltas(), self.settings.ema_decay
        return {name: averaged[name].lerp(delta, 1 - decay) for name, delta in now.items()} if averaged else now


def _scaled(pair: LoRAPair, scale: float):
    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        return output + scale * linear(linear(x, pair.a.to(x.dtype)), pair.b.to(x.dtype))

    return add


METHOD = Method(
    "published-gs-lora++",
    "Zhao et al., T-PAMI 2026, arXiv 2501.09705",
    published_gs_lora,
    PublishedSettings,
    ({"bnd": 20.0}, {"bnd": 20.0, "lr": 3e-3}, {"lr": 3e-3}, {"push": 0.01}, {"alpha": 1e-3}),
)
WITHOUT_PROTOTYPES = Method(
    "published-gs-lora",
    "Zhao et al., CVPR 2024, arXiv 2403.11530",
    published_gs_lora,
    functools.partial(PublishedSettings, prototypes=False),
    ({"bnd": 20.0}, {"bnd": 20.0, "lr": 3e-3}, {"lr": 3e-3}, {"alpha": 1e-3}),
)

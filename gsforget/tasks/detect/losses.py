"""Losses of a request to forget object kinds.

Every query is taught what the detector before the request says of it, had the forgotten kinds never been there: retained
kinds as they were, forgotten kinds at the level at which they stand on images that hold none of them (sigmoid), or their
probability given to "no object" (softmax).  Boxes stay where they were, those of forgotten objects as well.

To this come the two parts of the published loss (GS-LoRA, arXiv 2403.11530, its branch `object-det`), with the
detector's own loss as transformers computes it: on retained objects as it is, on forgotten objects with a bounded ascent
on the classification term alone, ReLU(BND - cls), the terms of the boxes kept positive.  An image that holds both
serves both, as it does there: once with its retained objects, once with its forgotten ones.

GS-LoRA++ (arXiv 2501.09705) looks at what the head reads of each query as well: queries on forgotten objects are pushed
from their kind's prototype, which is the kind's row of the head, up to a bound, and queries on retained objects are
pulled to where they were.  What a linear probe could still tell of forgotten objects is taken away (`queries`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, kl_div

from gsforget.errors import RequestError
from gsforget.export.device.detections import Found, select
from gsforget.lora.blocks import FeedForward, find_feed_forward
from gsforget.tasks.base import Losses, Reader, Score, Seen
from gsforget.tasks.detect.ap import bootstrap, match
from gsforget.tasks.detect.boxes import centred, giou
from gsforget.tasks.detect.coco import Scene
from gsforget.tasks.detect.families import Family
from gsforget.tasks.detect.models import head_of, own_loss, reader
from gsforget.tasks.detect.queries import ObjectQueries

BOX_WEIGHTS = 5.0, 2.0  # of L1 and GIoU, those of DETR
OWN_WEIGHT = 0.1  # of the detector's own loss on retained objects
HINGE_WEIGHT = 4.0  # of forgotten kinds above their level; at 1 a little of them comes back as queries change
ASCENT_WEIGHT = 0.2
PUSH_WEIGHT, PUSH_BOUND, PULL_WEIGHT = 0.05, 4.0, 2.0
SEPARABILITY_WEIGHT = 0.0125  # at depth 1
LEVEL = 0.5  # quantile of a kind's logits on images without it, which it is brought down to
MARGIN = 1.0  # below that level, in nats, where nothing more is asked
CLEAR = 0.3  # probability from which a query counts as one on an object
FREE = 0.5  # points of AP that may be lost on validation images where more is taken from the queries
DRAWS = 100  # of the bootstrap on validation images


@dataclass(frozen=True)
class Targets:
    """What is on the images: per image kinds int64 [n] and boxes float32 [n, 4] (centre, width, height, as shares)."""

    kinds: list[Tensor]
    boxes: list[Tensor]

    def of(self, rows: Sequence[int], kinds: Tensor, device: torch.device) -> list[dict[str, Tensor]]:
        """As transformers wants them, of some images and some kinds only."""
        found = []
        for row in rows:
            here = torch.isin(self.kinds[row], kinds)
            found.append({"class_labels": self.kinds[row][here].to(device), "boxes": self.boxes[row][here].to(device)})
        return found


def targets_of(scenes: Sequence[Scene]) -> Targets:
    """What a detector is to find on scenes; crowds are not learned from."""
    kept = [~s.crowd for s in scenes]
    kinds = [torch.from_numpy(s.kinds[k]) for s, k in zip(scenes, kept)]
    return Targets(kinds, [torch.from_numpy(centred(s.boxes[k], s.frame)) for s, k in zip(scenes, kept)])


@dataclass(frozen=True)
class Detection:
    """One request.

    Attributes:
        model, family: the detector.
        forget, erased: kinds to forget now, and those that earlier requests forgot.
        targets, scenes: of the material's images, by row.
        bound: BND of the ascent; None: what the detector's own loss is where forgotten kinds stand at their level.
        method: gs-lora looks at the answers only, gs-lora++ at the queries as well.
        batch: images to run at once, at most.
    """

    model: nn.Module
    family: Family
    forget: tuple[int, ...]
    erased: tuple[int, ...]
    targets: Targets
    scenes: list[Scene]
    bound: float | None = None
    method: str = "gs-lora++"
    seed: int = 0
    batch: int = 256
    name: str = "detect"
    chosen: dict[str, Any] = field(default_factory=dict)

    def networks(self, model: nn.Module, example: Tensor) -> list[FeedForward]:
        return feed_forward_of(model, example)

    def reader(self, model: nn.Module, example: Tensor) -> Reader:
        return reader(model, self.family)

    def objective(self, before: Seen, labels: Tensor, forget: Tensor, train: Tensor) -> DetectionObjective:
        objective = DetectionObjective(self, before, forget, train)
        self.chosen.update(levels=objective.levels.tolist(), bnd=objective.bound)
        return objective


def feed_forward_of(model: nn.Module, example: Tensor) -> list[FeedForward]:
    """The feed-forward networks of encoder and decoder; those of the heads are left alone."""
    found = [f for f in find_feed_forward(model, example) if model.is_feed_forward(f.linears)]
    if not found:
        raise RequestError(
            "No feed-forward network was found in the detector's encoder or decoder.",
            "gsforget works on detectors whose feed-forward layers are torch.nn.Linear.",
            "no_feed_forward",
        )
    return found


class DetectionObjective:
    """See `gsforget.tasks.base.Objective`; `before` is kept, for it is the target."""

    duel = None
    noise = FREE

    def __init__(self, task: Detection, before: Seen, forget: Tensor, train: Tensor):
        self.task, self.before, self.forget = task, before, forget
        self.sigmoid = task.family.scoring == "sigmoid"
        self.device = before.outputs.device
        count = before.outputs.shape[-1] - (0 if self.sigmoid else 1)
        self.gone = torch.tensor(sorted({*task.forget, *task.erased}), device=self.device)
        self.now = torch.tensor(sorted(task.forget))
        self.kept = torch.tensor([k for k in range(count) if k not in set(self.gone.tolist())])
        self.kept_here = self.kept.to(self.device)
        self.levels = self._levels(train)
        self.prototypes = head_of(task.model, task.family).weight.detach().float()[:count]
        with torch.no_grad():
            self.bound = self._bound(train) if task.bound is None else task.bound
        self.queries: ObjectQueries | None = None
        if task.method == "gs-lora++":
            self.queries = ObjectQueries(task.targets.kinds, task.targets.boxes, before, train, self.gone)

    def _levels(self, train: Tensor) -> Tensor:
        """What each forgotten kind's logit may be, [gone]: as on images without it."""
        levels = []
        for k in self.gone.tolist():
            without = [r for r in train.tolist() if not (self.task.targets.kinds[r] == k).any()]
            logits = self.before.outputs[(without or train.tolist())[:512]][..., k].flatten().float()
            levels.append(torch.quantile(logits[: 2**20], LEVEL) - MARGIN)
        return torch.stack(levels)

    def _bound(self, train: Tensor) -> float:
        """The detector's own classification loss on forgotten objects where their kinds stand at their levels."""
        rows = train[self.forget[train]][:64]
        if not len(rows):
            return 0.0
        masked = self.before.rows(rows)
        logits = masked.outputs.clone()
        if self.sigmoid:
            logits[..., self.gone] = torch.minimum(logits[..., self.gone], self.levels)
        else:
            logits[..., self.gone] = -np.log(logits.shape[-1]) - 1 + logits.logsumexp(-1, keepdim=True)
        return own_loss(self.task.model, Seen(logits, more=masked.more), self._targets(rows, self.now))[0].item()

    def _targets(self, rows: Tensor, kinds: Tensor) -> list[dict[str, Tensor]]:
        return self.task.targets.of(rows.tolist(), kinds, self.device)

    @property
    def deepens(self) -> bool:
        return self.queries is not None and self.queries.opposed

    def losses(self, seen: Seen, rows: Tensor, depth: float = 1.0) -> Losses:
        at, rows = rows.cpu(), rows.to(self.device)
        before, now = self._aligned(seen, rows), self.forget[rows]
        clear = self._clear(before)
        objects = clear.sum().clamp_min(1.0)
        taught, hinge = self._taught(seen.outputs.float(), before)
        box = self._boxes(seen.more["boxes"].float(), before.more["boxes"], clear)
        retain = (taught + box) / objects
        forgotten = HINGE_WEIGHT * hinge / objects
        own = own_loss(self.task.model, seen, self._targets(rows, self.kept))
        retain = retain + OWN_WEIGHT * sum(own)
        if now.any():
            mine = seen.rows(torch.nonzero(now).flatten())
            ascent, around = own_loss(self.task.model, mine, self._targets(rows[now], self.now))
            forgotten = forgotten + ASCENT_WEIGHT * (self.bound - ascent).relu() + OWN_WEIGHT * around
        if self.queries is not None:
            pull, push = self._prototypes(seen, before)
            retain, forgotten = retain + PULL_WEIGHT * pull, forgotten + PUSH_WEIGHT * push
            forgotten = forgotten + depth * SEPARABILITY_WEIGHT * self.queries.loss(seen, at)
        return Losses(retain + forgotten, retain, forgotten)

    def _aligned(self, seen: Seen, rows: Tensor) -> Seen:
        """What the model before made of the images, its queries in the order of those of the model in training."""
        before = self.before.rows(rows)
        if "anchors" not in seen.more:
            return before
        apart = torch.cdist(seen.more["anchors"].detach().float(), before.more["anchors"], p=1)
        if apart.diagonal(dim1=1, dim2=2).max() < 1e-4:
            return before
        from scipy.optimize import linear_sum_assignment

        order = torch.from_numpy(np.stack([linear_sum_assignment(c)[1] for c in apart.cpu().numpy()])).to(self.device)

        def sorted_(t: Tensor) -> Tensor:
            return torch.gather(t, 1, order[..., None].expand(-1, -1, t.shape[-1]))

        return before.with_tensors([sorted_(t) for t in before.tensors])

    def _probabilities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.sigmoid else logits.softmax(-1)[..., :-1]

    def _clear(self, before: Seen) -> Tensor:
        """How surely each query of the model before is on an object, of whatever kind, [B, Q]."""
        return self._probabilities(before.outputs).amax(-1)

    def _taught(self, logits: Tensor, before: Seen) -> tuple[Tensor, Tensor]:
        """Distance to the answers before the request without the forgotten kinds, and these above their levels; sums."""
        if self.sigmoid:
            old, new = before.outputs[..., self.kept_here], logits[..., self.kept_here]
            target = old.sigmoid()
            distance = binary_cross_entropy_with_logits(
                new, target, reduction="sum"
            ) - binary_cross_entropy_with_logits(old, target, reduction="sum")
            above = (logits[..., self.gone] - self.levels).relu()
            was = self._probabilities(before.outputs)[..., self.gone]
            return distance, ((0.02 + was) * above**2).sum() / 4
        target = before.outputs.softmax(-1)
        target[..., -1] += target[..., self.gone].sum(-1)
        target[..., self.gone] = 0
        # Queries on nothing are many; DETR's own loss weighs them by a tenth.
        weight = 0.1 + 0.9 * self._clear(before)
        distance = cross_entropy(logits.transpose(1, 2), target.transpose(1, 2), reduction="none")
        entropy = torch.special.entr(target).sum(-1)
        log = logits.log_softmax(-1)
        above = (log[..., self.gone] - self.levels_of_softmax).relu()
        return (weight * (distance - entropy)).sum(), (weight[..., None] * above).sum() / 4

    @cached_property
    def levels_of_softmax(self) -> float:
        """Log-probability that a forgotten kind may have: well below guessing."""
        return -float(np.log(self.before.outputs.shape[-1])) - 3

    def _boxes(self, boxes: Tensor, before: Tensor, clear: Tensor) -> Tensor:
        l1 = (boxes - before).abs().sum(-1)
        return (clear * (BOX_WEIGHTS[0] * l1 + BOX_WEIGHTS[1] * (1 - giou(boxes, before)))).sum()

    def _prototypes(self, seen: Seen, before: Seen) -> tuple[Tensor, Tensor]:
        """Pull of queries on retained objects to where they were; push of those on forgotten ones from the head's rows."""
        new, old = seen.more["queries"].float(), before.more["queries"]
        found = self._probabilities(before.outputs)
        best, kind = found.max(-1)
        gone = torch.isin(kind, self.now.to(kind.device)) & (best > CLEAR)
        stays = torch.isin(kind, self.kept_here) & (best > CLEAR)
        scale = old.var(dim=(0, 1)).mean().clamp_min(1e-6)
        pull = ((new - old)[stays] ** 2).mean() / scale if stays.any() else new.new_zeros(())
        if not gone.any():
            return pull, new.new_zeros(())
        toward = self.prototypes[kind[gone]].log_softmax(-1)
        away = kl_div(new[gone].log_softmax(-1), toward, reduction="none", log_target=True).sum(-1)
        return pull, (PUSH_BOUND - away).relu().mean()

    def found(self, seen: Seen) -> Found:
        return found_by(seen, self.task.family)

    def score(self, seen: Seen, rows: Tensor, shows: Tensor) -> Score:
        """AP50 of forgotten kinds and AP of retained ones, in percent."""
        del shows
        at = rows.cpu()
        scenes = [self.task.scenes[r] for r in at.tolist()]
        found, found_before = self.found(seen), self.found(self.before.rows(rows))
        gone = [match(found, scenes, k) for k in self.now.tolist()]
        after, before = ([match(f, scenes, k) for k in self.kept.tolist()] for f in (found, found_before))
        forget = _mean_percent([m.ap()[0] for m in gone])
        retain, retain_before = (_mean_percent([m.ap().mean() for m in side]) for side in (after, before))
        if retain is None:
            return Score(forget, None, None, None, None)
        drawn = [np.nanmean(bootstrap(side, self.task.seed, DRAWS), axis=(1, 2)) for side in (before, after)]
        drop = 100 * (drawn[0] - drawn[1])
        low, high = np.quantile(drop, (0.05, 0.95))
        return Score(forget, retain, retain_before, float(low), float(high))

    def right(self, seen: Seen, rows: Tensor) -> Tensor:
        """Never asked: images of kinds forgotten earlier are retained images, on which these kinds stay suppressed."""
        return torch.zeros(len(rows), dtype=torch.bool)

    def with_earlier(self, see: Callable[[], Seen], rows: Tensor, depth: float) -> None:
        """From the first step on, the opponents look at objects of kinds forgotten earlier too."""
        del see, rows, depth

    def named(self, seen: Seen, rows: Tensor) -> Tensor | None:
        """Of forgotten objects on the images, by the opponent of the training."""
        return None if self.queries is None else self.queries.named(seen, rows.cpu())


def found_by(seen: Seen, family: Family) -> Found:
    """Detections of a model's outputs as its own post-processing gives them, nothing masked."""
    logits, boxes = seen.outputs.float().cpu().numpy(), seen.more["boxes"].float().cpu().numpy()
    return select(logits, boxes, family.scoring, family.most or logits.shape[1])


def _mean_percent(values: Sequence[float]) -> float | None:
    """Mean in percent over kinds that occur; None where none does."""
    there = [v for v in values if not np.isnan(v)]
    return 100 * float(np.mean(there)) if there else None

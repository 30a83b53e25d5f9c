"""What a detector's features still hold of forgotten kinds: probes on the queries that lie on objects, and relearning.

An object's feature is what the class head reads of the query whose box covers the object best, so that a probe is asked
about objects as a classifier's is about images.  Attacks are those of `gsforget.audit`; they mean something only next to
a detector that never saw the kinds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gsforget.audit import checks, probes, relearn
from gsforget.audit.checks import Check, Limits
from gsforget.audit.deep import curves_json
from gsforget.audit.relearn import Curve, Starts
from gsforget.data import Split
from gsforget.images import ImageSet
from gsforget.tasks.detect.ap import match
from gsforget.tasks.detect.losses import found_by, targets_of
from gsforget.tasks.detect.models import head_of, own_loss, reader
from gsforget.tasks.detect.queries import on_objects

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gsforget.tasks.base import Load, Seen
    from gsforget.tasks.detect.coco import Scene
    from gsforget.tasks.detect.families import Family

PER_KIND = 50  # training objects of each kind, and test objects at least
MOST = 500  # test objects in all, or so, and images that show them: with a hundred, a probe is good to five points only
SIDES = ("subject", "original", "reference")
HEAD_STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 65, 80, 100)
FULL_STEPS = (1, 2, 4, 7, 10, 15, 20, 30, 40, 60, 80, 100)
RELEARN_IMAGES, RELEARN_TEST = 200, 200  # with forgotten kinds, and as many without; measured on
RELEARN_BATCH = 16
RATIO = "of the forgotten objects"


@dataclass(frozen=True)
class Objects:
    """Objects as a detector's head reads them: features float32 [M, d], kinds int64 [M]."""

    features: np.ndarray
    kinds: np.ndarray


@dataclass(frozen=True)
class Probed:
    """One detector with its objects on training and test images.

    Attributes:
        weight, bias: of the class head, [K, d] and [K], without the row of "no object".
    """

    model: nn.Module
    train: Objects
    test: Objects
    weight: np.ndarray
    bias: np.ndarray | None


@dataclass(frozen=True)
class Looked:
    """The images that all detectors of an audit are asked about.

    Attributes:
        tested: gone kinds that both splits show; retained: kinds that were never forgotten.
        train, test: scenes, framed; load: reads an image file for the detectors.
        batch: images to run at once.
    """

    family: Family
    tested: list[int]
    retained: list[int]
    train: list[Scene]
    test: list[Scene]
    load: Load
    device: torch.device
    batch: int
    seed: int = 0
    skip_corrupt: bool = False


def objects_of(seen: Seen, scenes: Sequence[Scene]) -> Objects:
    """The objects on the scenes of a batch, crowds left out, each by the query whose box covers it best."""
    targets = targets_of(scenes)
    place = torch.arange(len(scenes)).repeat_interleave(torch.tensor([len(k) for k in targets.kinds]))
    device = seen.outputs.device
    features = on_objects(seen, place.to(device), torch.cat(targets.boxes).to(device))
    return Objects(features.cpu().numpy(), torch.cat(targets.kinds).numpy())


def choose(scenes: Sequence[Scene], kinds: Sequence[int], per_kind: int, seed: int) -> list[Scene]:
    """Scenes, in seeded order, until each kind is there so often, or no more of it are left."""
    left = dict.fromkeys(kinds, per_kind)
    chosen = []
    for i in np.random.default_rng(seed).permutation(len(scenes)):
        here = [int(k) for k in scenes[i].kinds[~scenes[i].crowd]]
        if any(left.get(k, 0) > 0 for k in here):
            chosen.append(scenes[i])
            for k in here:
                left[k] = left.get(k, 0) - 1
    return chosen


def probed(model: nn.Module, at: Looked) -> Probed:
    """Ask one detector about the objects of both splits."""
    head = head_of(model, at.family)
    count = len(head.weight) - (at.family.scoring == "softmax")
    weight, bias = head.weight.detach().double().cpu().numpy()[:count], None
    if head.bias is not None:
        bias = head.bias.detach().double().cpu().numpy()[:count]
    train, test = (_read(model, at, scenes) for scenes in (at.train, at.test))
    gone = np.isin(test.kinds, at.tested)
    return Probed(model, train, Objects(test.features[gone], test.kinds[gone]), weight, bias)


def _read(model: nn.Module, at: Looked, scenes: Sequence[Scene]) -> Objects:
    images, scenes = _images(at, scenes)
    read = reader(model, at.family)
    found = []
    with torch.inference_mode():
        for rows in torch.arange(len(images)).split(at.batch):
            seen = read(images.batch(rows).to(at.device))
            found.append(objects_of(seen, [scenes[r] for r in rows.tolist()]))
    return Objects(np.concatenate([f.features for f in found]), np.concatenate([f.kinds for f in found]))


def _images(at: Looked, scenes: Sequence[Scene]) -> tuple[ImageSet, list[Scene]]:
    images = ImageSet(Split([s.path for s in scenes], np.zeros(len(scenes), np.int64)), at.load, at.skip_corrupt)
    images.check()
    gone = set(images.dropped)
    return images, [s for s in scenes if s.path not in gone]


def standard(sides: dict[str, Probed | None], at: Looked, limits: Limits) -> tuple[list[Check], dict[str, Any]]:
    """``prototype_attack``, ``five_shot`` and ``linear_probe_excess``; beside them, relearning of the head alone."""
    assert sides["subject"] is not None
    assert at.tested

    def each(attack: Callable[[Probed], float]) -> dict[str, float | None]:
        return {name: None if side is None else attack(side) for name, side in sides.items()}

    rows, means = each(lambda p: _rows_replaced(p, at)), each(lambda p: _five_shot(p, at))
    probe = each(lambda p: probes.linear_probe(*_four(p), at.tested, seed=at.seed))
    count = len(sides["subject"].test.kinds)
    counts = count, count if sides["reference"] else 0
    made = []
    for name, what, found in (
        ("prototype_attack", "With five objects per kind put into the head, the detector names", rows),
        ("five_shot", "By the nearest mean of five objects, the queries name", means),
    ):
        assert found["subject"] is not None
        says = f"{what} {found['subject']:.1f} % {RATIO}"
        made.append(checks.attack(name, says, found["subject"], found["original"], found["reference"], counts))
    assert probe["subject"] is not None
    judged = checks.probe(probe["subject"], probe["original"], probe["reference"], limits)
    made.append(replace(judged, says=judged.says.replace("forgotten images", "forgotten objects")))
    curves = {name: None if side is None else _head_curve(side, at) for name, side in sides.items()}
    named = {"after": probe["subject"], "original": probe["original"], "reference": probe["reference"]}
    return made, {"linear_probe": named, "relearning": {"head": curves_json(curves)}}


def full(sides: dict[str, Probed | None], at: Looked, limits: Limits) -> tuple[Check, dict[str, Any]]:
    """``relearn_full``: all weights trained by the detector's own loss until AP50 of the gone kinds is back."""
    test = [s for s in at.test if np.isin(s.kinds, at.tested).any()][:RELEARN_TEST]
    images, scenes = _images(at, test)
    original = sides["original"]
    known = 100.0 if original is None else _ap50(original.model, at, images, scenes)
    goal = limits.recover_share * known
    starts: dict[str, Starts | None] = dict.fromkeys(SIDES)
    for name, side in sides.items():
        if side is not None:
            both = (side.model, _imprinted(side, at))
            starts[name] = Starts(*(_relearned(model, at, images, scenes, goal) for model in both))
    assert starts["subject"] is not None
    check = checks.relearning(starts["subject"], starts["original"], starts["reference"], known, limits)
    goal = checks.relearning_goal(starts["reference"], known, limits)
    curves = {
        "full": {name: s.faster(goal) if s else None for name, s in starts.items()},
        "full_own_head": {name: s.own if s else None for name, s in starts.items()},
    }
    return check, {mode: curves_json(found) for mode, found in curves.items()}


def _four(p: Probed) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return p.train.features, p.train.kinds, p.test.features, p.test.kinds


def _five_shot(p: Probed, at: Looked) -> float:
    return probes.five_shot(*_four(p), at.tested, seed=at.seed)


def _rows_replaced(p: Probed, at: Looked) -> float:
    gone = np.isin(p.train.kinds, at.tested)
    return probes.prototype_attack(
        p.weight,
        p.bias,
        p.train.features[gone],
        p.train.kinds[gone],
        p.test.features,
        p.test.kinds,
        at.tested,
        retained_features=p.train.features[~gone],
        seed=at.seed,
        in_use=at.retained,
    )


def _head_curve(p: Probed, at: Looked) -> Curve:
    """On the objects of gone kinds and as many others; among kinds alone, without "no object"."""
    gone = np.flatnonzero(np.isin(p.train.kinds, at.tested))
    others = np.setdiff1d(np.arange(len(p.train.kinds)), gone)
    rows = np.concatenate([gone, np.random.default_rng(at.seed).permutation(others)[: len(gone)]])
    weight, bias = (None if part is None else torch.from_numpy(part).float() for part in (p.weight, p.bias))
    assert weight is not None
    features, kinds = torch.from_numpy(p.train.features[rows]), torch.from_numpy(p.train.kinds[rows])
    test = torch.from_numpy(p.test.features), torch.from_numpy(p.test.kinds)
    return relearn.relearn_head(weight, bias, features, kinds, *test, HEAD_STEPS[-1], HEAD_STEPS, seed=at.seed)


@torch.no_grad()
def _imprinted(p: Probed, at: Looked) -> nn.Module:
    """A copy whose head has the means of gone objects as their kinds' rows."""
    gone = np.isin(p.train.kinds, at.tested)
    weight, bias = probes.imprint(
        p.weight,
        p.bias,
        p.train.features[gone],
        p.train.kinds[gone],
        at.tested,
        p.train.features[~gone],
        at.retained,
    )
    made = copy.deepcopy(p.model)
    head = head_of(made, at.family)
    head.weight[: len(weight)] = torch.from_numpy(weight).to(head.weight)
    if head.bias is not None:
        head.bias[: len(bias)] = torch.from_numpy(bias).to(head.bias)
    return made


def _relearned(model: nn.Module, at: Looked, test: ImageSet, scenes: list[Scene], goal: float) -> Curve:
    """Fine-tune a copy of a detector on training images with gone kinds and as many without, all their objects wanted."""
    holds = [bool(np.isin(s.kinds, at.tested).any()) for s in at.train]
    wanted = [s for s, there in zip(at.train, holds) if there][:RELEARN_IMAGES]
    chosen = wanted + [s for s, there in zip(at.train, holds) if not there][: len(wanted)]
    images, chosen = _images(at, chosen)
    targets = targets_of(chosen)
    subject = copy.deepcopy(model).eval().requires_grad_(False)
    read = reader(subject, at.family)
    kinds = torch.tensor([*at.tested, *at.retained])

    def loss(rows: Tensor) -> Tensor:
        seen = read(images.batch(rows).to(at.device))
        classes, boxes = own_loss(subject, seen, targets.of(rows.tolist(), kinds, at.device))
        return classes + boxes

    def measure() -> float:
        return _ap50(subject, at, test, scenes)

    batches = relearn.endless_batches(torch.arange(len(images)), min(RELEARN_BATCH, at.batch), at.seed)
    parameters = [p for p in subject.parameters() if p.is_floating_point()]
    return relearn.fine_tune(
        parameters, loss, batches, measure, measure(), FULL_STEPS[-1], FULL_STEPS, relearn.FULL_LRS[0], goal
    )


def _ap50(model: nn.Module, at: Looked, images: ImageSet, scenes: list[Scene]) -> float:
    """AP50 of the gone kinds in percent, over those that the scenes show."""
    from gsforget.tasks.base import Seen

    read, pieces = reader(model, at.family), []
    with torch.inference_mode():
        for rows in torch.arange(len(images)).split(at.batch):
            seen = read(images.batch(rows).to(at.device))
            pieces.append(Seen(seen.outputs.float().cpu(), more={"boxes": seen.more["boxes"].float().cpu()}))
    found = found_by(Seen.joined(pieces), at.family)
    return 100 * float(np.nanmean([match(found, scenes, k).ap()[0] for k in at.tested]))

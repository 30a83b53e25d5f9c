"""Average precision by the rules of COCO, in numpy, with what chance may make of it.

`match` is the one expensive step: which detections are right, at each of COCO's ten overlaps.  From its result AP is a
sum over ranks, so that resampling images costs little: bounds come from a bootstrap over images.  The figures of a
report come from a COCO evaluator (`evaluate`); a test proves that both agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gsforget.export.device.detections import Found
from gsforget.tasks.detect.coco import Scene

OVERLAPS = np.linspace(0.5, 0.95, 10)  # of boxes, intersection over union
RECALLS = np.linspace(0, 1, 101)
MOST = 100  # detections per image
DRAWS = 200  # of the bootstrap


@dataclass(frozen=True)
class Matches:
    """Detections of one kind, best first.

    Attributes:
        image: int64 [D]; right, counted: bool [10, D] by overlap; a detection of a crowd is not counted.
        objects: int64 [N], how many there are on each image.
    """

    image: np.ndarray
    right: np.ndarray
    counted: np.ndarray
    objects: np.ndarray

    def ap(self, images: np.ndarray | None = None) -> np.ndarray:
        """AP at each overlap, float [10], 0 to 1; NaN without objects.  images: how often each counts, int64 [N]."""
        times = np.ones(len(self.objects), np.int64) if images is None else images
        total = int((self.objects * times).sum())
        if not total:
            return np.full(len(OVERLAPS), np.nan)
        weights = times[self.image]
        right = np.cumsum(self.right * weights, 1)
        wrong = np.cumsum(~self.right * self.counted * weights, 1)
        recall, precision = right / total, right / np.maximum(right + wrong, 1)
        best = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]  # precision never falls with recall
        found = np.zeros((len(OVERLAPS), len(RECALLS)))
        for t in range(len(OVERLAPS)):
            # COCO compares in double precision; the recalls of rounding's making lie on either side of a step.
            places = np.searchsorted(recall[t], RECALLS, side="left")
            there = places < recall.shape[1]
            found[t, there] = best[t, places[there]]
        return found.mean(1)


def match(found: Found, scenes: Sequence[Scene], kind: int) -> Matches:
    """Match detections of one kind with objects, image by image, the best detection first (COCO's greedy rule)."""
    images, scores, right, counted, objects = [], [], [], [], []
    for n, scene in enumerate(scenes):
        mine = np.flatnonzero(found.kinds[n] == kind)
        mine = mine[np.argsort(-found.scores[n][mine], kind="stable")][:MOST]
        here = scene.kinds == kind
        objects.append(int((here & ~scene.crowd).sum()))
        if not len(mine):
            continue
        hit, count = _match_image(_pixels(found.boxes[n][mine], scene.frame), scene.boxes[here], scene.crowd[here])
        images.append(np.full(len(mine), n))
        scores.append(found.scores[n][mine])
        right.append(hit)
        counted.append(count)
    if not images:
        empty = np.zeros((len(OVERLAPS), 0), bool)
        return Matches(np.zeros(0, np.int64), empty, empty, np.asarray(objects))
    order = np.argsort(-np.concatenate(scores), kind="mergesort")
    return Matches(
        np.concatenate(images)[order],
        np.concatenate(right, 1)[:, order],
        np.concatenate(counted, 1)[:, order],
        np.asarray(objects),
    )


def bootstrap(matches: Sequence[Matches], seed: int, draws: int = DRAWS) -> np.ndarray:
    """AP of each kind with images drawn anew, float [draws, kinds, 10]; the same draws for the same seed and images."""
    count = len(matches[0].objects)
    rng = np.random.default_rng(seed)
    drawn = (np.bincount(rng.integers(0, count, count), minlength=count) for _ in range(draws))
    return np.stack([[m.ap(times) for m in matches] for times in drawn])


def overlaps(boxes: np.ndarray, others: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """[D, G] of boxes [D, 4] and [G, 4] (left, top, width, height); with a crowd, the share of the box inside it."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, :2] + boxes[:, None, 2:], others[None, :, :2] + others[None, :, 2:])
    shared = (high - low).clip(0).prod(-1)
    own, other = boxes[:, 2:].prod(-1)[:, None], others[:, 2:].prod(-1)[None]
    union = np.where(crowd[None], own, own + other - shared)
    return shared / np.maximum(union, 1e-12)


def _pixels(corners: np.ndarray, frame: tuple[float, float]) -> np.ndarray:
    """Corners as shares of the image -> left, top, width, height in pixels, float64 [D, 4]."""
    edges = corners.astype(np.float64) * np.array([*frame, *frame])
    return np.concatenate([edges[:, :2], edges[:, 2:] - edges[:, :2]], 1)


def _match_image(boxes: np.ndarray, objects: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Right and counted, bool [10, D], of the detections of one image, best first."""
    right = np.zeros((len(OVERLAPS), len(boxes)), bool)
    counted = np.ones_like(right)
    if not len(objects):
        return right, counted
    order = np.argsort(crowd, kind="stable")  # objects before crowds
    crowd, shared = crowd[order], overlaps(boxes, objects[order].astype(np.float64), crowd[order])
    for t, least in enumerate(OVERLAPS):
        free = np.ones(len(crowd), bool)
        for d in range(len(boxes)):
            for group, takes in ((~crowd, True), (crowd, False)):
                open_ = group & (free | crowd) & (shared[d] >= min(least, 1 - 1e-10))
                if open_.any():
                    candidates = np.flatnonzero(open_)
                    best = candidates[shared[d][candidates].max() == shared[d][candidates]][-1]
                    free[best] &= not takes
                    right[t, d], counted[t, d] = takes, takes
                    break
    return right, counted

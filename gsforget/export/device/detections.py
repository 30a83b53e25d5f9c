"""From a detector's raw outputs to boxes, scores and kinds, in numpy; the same on devices, in gates and in reports.

The steps are those of each model's own post-processing in transformers: where every kind has a probability of its own
(sigmoid: Deformable DETR, RT-DETR), the best pairs of query and kind; where the kinds of a query share one (softmax:
DETR, YOLOS), the best kind of each query, "no object" left out.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from gsforget.errors import RequestError

SCORINGS = ("sigmoid", "softmax")


@dataclass(frozen=True)
class Found:
    """Detections of N images, M each, best first.

    Attributes:
        scores: float32 [N, M], 0 to 1; kinds: int64 [N, M].
        boxes: float32 [N, M, 4], left, top, right and bottom as shares of the image's width and height.
    """

    scores: np.ndarray
    kinds: np.ndarray
    boxes: np.ndarray


def select(logits: np.ndarray, boxes: np.ndarray, scoring: str, most: int, hidden: Collection[int] = ()) -> Found:
    """The detections among a model's queries.

    Args:
        logits: float [N, Q, K], with one more column for "no object" where the scoring is softmax.
        boxes: float [N, Q, 4], centre, width and height as shares of the image.
        scoring: one of ``SCORINGS``.
        most: detections per image, at most; softmax gives one per query whatever this says.
        hidden: kinds that are never returned: those that were forgotten.  Gates pass none.

    Raises RequestError ``nan_logits`` where outputs are not finite.
    """
    if not (np.isfinite(logits).all() and np.isfinite(boxes).all()):
        raise RequestError(
            "The detector's outputs are NaN or infinite.",
            "Export the model at a higher precision, such as --precision fp32.",
            "nan_logits",
        )
    logits = logits.astype(np.float32)
    probabilities = _softmax(logits)[..., :-1] if scoring == "softmax" else 1 / (1 + np.exp(-logits))
    if hidden:
        probabilities[..., sorted(hidden)] = -1  # below any probability, so that such pairs come last and are cut
    corners = to_corners(boxes.astype(np.float32))
    if scoring == "softmax":
        kinds = probabilities.argmax(-1)
        scores = np.take_along_axis(probabilities, kinds[..., None], -1)[..., 0]
        order = np.argsort(-scores, axis=1, kind="stable")
        queries = order
        kinds = np.take_along_axis(kinds, order, 1)
    else:
        count, _, each = probabilities.shape
        flat = probabilities.reshape(count, -1)
        left = flat.shape[1] - len(set(hidden)) * probabilities.shape[1]
        order = np.argsort(-flat, axis=1, kind="stable")[:, : min(most, left)]
        scores, queries, kinds = flat, order // each, order % each
    return Found(
        np.take_along_axis(scores, order, 1),
        kinds.astype(np.int64),
        np.take_along_axis(corners, queries[..., None].repeat(4, -1), 1),
    )


def to_corners(boxes: np.ndarray) -> np.ndarray:
    """[…, 4]: centre, width and height to left, top, right and bottom."""
    x, y, w, h = np.moveaxis(boxes, -1, 0)
    return np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)


def describe(
    found: Found, image: int, size: tuple[int, int], names: list[str], threshold: float, hidden: Collection[int] = ()
) -> list[dict[str, Any]]:
    """Detections of one image as `infer` returns them: ``[{"class", "score", "box"}]``, boxes in pixels of the image.

    Args:
        size: width and height of the image file; threshold: lowest score.
    """
    width, height = size
    listed = []
    for score, kind, box in zip(found.scores[image], found.kinds[image], found.boxes[image], strict=True):
        if score >= threshold and int(kind) not in hidden:
            edges = np.clip(box, 0, 1) * np.array([width, height, width, height], np.float32)
            listed.append(
                {"class": names[int(kind)], "score": float(score), "box": [round(float(e), 1) for e in edges]}
            )
    return listed


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)

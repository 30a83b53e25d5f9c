"""What a model's answers give away: the rank of the truth, who else is named instead, and what changed for the others.

All functions are pure, take numpy arrays and look only at outputs (evaluation level 1: any black box can be asked).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gsforget.errors import RequestError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


class Sink(NamedTuple):
    """A retained class as which forgotten images are recognised: share in percent, mean probability 0 to 1."""

    class_index: int
    share: float
    mean_probability: float


class Churn(NamedTuple):
    """Percent of images whose answer changed, and of images that were right and are now wrong."""

    changed: float
    negative_flips: float


def rank_of_truth(logits: ArrayLike, labels: ArrayLike) -> NDArray[np.int64]:
    """Place of the true class among all classes, int64 [N], 1 = named first.

    Accuracy 0 with the truth always in second place is hiding, not forgetting.  Ties share the mean of their places,
    rounded towards the top (the side that speaks against forgetting): the truth among K equal logits is at (K + 1) // 2.

    Args:
        logits: [N, K], unmasked; -inf is allowed.
        labels: int [N].

    Raises:
        RequestError: ``nan_logits`` where there are NaN.
        ValueError: shapes do not fit.
    """
    values, truth = np.asarray(logits), np.asarray(labels)
    if values.ndim != 2 or truth.shape != values.shape[:1]:
        raise ValueError(f"logits {values.shape} and labels {truth.shape} must be [N, K] and [N]")
    if np.isnan(values).any():
        raise RequestError(
            "The model returns NaN for some images.", "Check the checkpoint and the precision it runs at.", "nan_logits"
        )
    own = values[np.arange(len(truth)), truth][:, None]
    above, tied = (values > own).sum(axis=1), (values == own).sum(axis=1) - 1
    return (1 + above + tied // 2).astype(np.int64)


def misattribution(probabilities: ArrayLike, threshold: float, retained: Sequence[int]) -> list[Sink]:
    """Retained classes that images of forgotten classes are recognised as, largest share first.

    An image counts where its most probable class is that retained class with a probability above the threshold (for
    identities: the forgotten person is taken for somebody else).

    Args:
        probabilities: [N, K] of images of forgotten classes only, 0 to 1.
        threshold: probability, 0 to 1, that must be exceeded.

    Returns:
        Classes with at least one such image: share of all N images in percent, mean top probability of those counted.

    Raises:
        ValueError: no images.
    """
    values = np.asarray(probabilities, dtype=np.float64)
    if values.ndim != 2 or not len(values):
        raise ValueError(f"probabilities must be [N, K] with at least one image, got {values.shape}")
    named, top = values.argmax(axis=1), values.max(axis=1)
    counted = np.isin(named, np.asarray(list(retained), dtype=np.int64)) & (top > threshold)
    sinks = [
        Sink(int(k), float(100 * (where := counted & (named == k)).mean()), float(top[where].mean()))
        for k in np.unique(named[counted])
    ]
    return sorted(sinks, key=lambda sink: (-sink.share, sink.class_index))


def churn(before: ArrayLike, after: ArrayLike, labels: ArrayLike) -> Churn:
    """How many answers changed between two models, in percent of the same images.

    Args:
        before, after, labels: int [N], predicted classes of both models and the true classes.

    Raises:
        ValueError: no images, or not the same number of them.
    """
    first, second, truth = np.asarray(before), np.asarray(after), np.asarray(labels)
    if not len(truth) or not len(first) == len(second) == len(truth):
        raise ValueError("before, after and labels must hold the same images, at least one")
    flipped = (first == truth) & (second != truth)
    return Churn(float(100 * (first != second).mean()), float(100 * flipped.mean()))


def class_drops(
    correct_before: ArrayLike, correct_after: ArrayLike, labels: ArrayLike, classes: Sequence[int]
) -> dict[int, float]:
    """Loss of accuracy per class in points (negative: better than before); classes without images are left out.

    Args:
        correct_before, correct_after: bool [N] on the same images; labels: int [N].
        classes: the retained classes, or the neighbours of the forgotten ones (see `probes.neighbours`).
    """
    first, second = np.asarray(correct_before, dtype=bool), np.asarray(correct_after, dtype=bool)
    truth = np.asarray(labels)
    if not len(first) == len(second) == len(truth):
        raise ValueError("before, after and labels must hold the same images")
    drops = {}
    for k in classes:
        where = truth == k
        if where.any():
            drops[int(k)] = float(100 * (first[where].mean() - second[where].mean()))
    return drops

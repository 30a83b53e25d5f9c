"""Accuracies with their uncertainty, and whether a model's accuracy on a data set makes sense at all.

All functions are pure and work on small arrays; percentages run from 0 to 100, means are weighted by images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gsforget.errors import RequestError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

Z_TWO_SIDED = 1.959963984540054  # 95 %, normal quantile at 0.975
Z_ONE_SIDED = 1.6448536269514722  # 95 %, normal quantile at 0.95
NEAR_CHANCE = 0.1  # Cohen's kappa below which a model is taken to be guessing
ORDER_GAIN = 10.0  # points of accuracy that another class order must win to be believed


@dataclass(frozen=True)
class Accuracy:
    """``right`` of ``count`` images."""

    right: int
    count: int

    @property
    def percent(self) -> float | None:
        """0 to 100; None without images."""
        return 100.0 * self.right / self.count if self.count else None

    def to_json(self) -> dict[str, Any]:
        """Percent, counts, and the two-sided 95 % Wilson interval in percent."""
        low, high = wilson(self.right, self.count) if self.count else (None, None)
        return {"acc": self.percent, "right": self.right, "count": self.count, "low": low, "high": high}


def percent(flags: NDArray[np.bool_] | Tensor) -> float | None:
    """Share of flags, bool [N], numpy or torch on any device, that are set, 0 to 100; None without any."""
    return Accuracy(int(flags.sum()), len(flags)).percent


def predict(logits: ArrayLike) -> NDArray[np.int64]:
    """Predicted classes, int64 [N], of logits [N, K] (numpy, or torch on any device).

    Raises RequestError ``nan_logits`` where a model returns NaN: no class is predicted then.
    """
    values = np.asarray(logits.detach().float().cpu() if hasattr(logits, "detach") else logits)
    broken = np.isnan(values).any(axis=1).sum()
    if broken:
        raise RequestError(
            f"The model returns NaN for {broken} of {len(values)} images.",
            "Check the checkpoint and the precision it is run at.",
            "nan_logits",
        )
    return values.argmax(axis=1).astype(np.int64)


def accuracy(correct: ArrayLike, where: ArrayLike | None = None) -> Accuracy:
    """Accuracy over ``correct``, bool [N]; ``where``, bool [N], selects images."""
    chosen = np.asarray(correct, dtype=bool)
    if where is not None:
        chosen = chosen[np.asarray(where, dtype=bool)]
    return Accuracy(int(chosen.sum()), len(chosen))


def of_classes(labels: ArrayLike, classes: Sequence[int]) -> NDArray[np.bool_]:
    """Mask, bool [N], of the images whose label is one of ``classes``."""
    return np.isin(np.asarray(labels), np.asarray(list(classes), dtype=np.int64))


def per_class(correct: ArrayLike, labels: ArrayLike, num_classes: int) -> list[Accuracy]:
    """One accuracy per class, in index order."""
    truth = np.asarray(labels)
    count = np.bincount(truth, minlength=num_classes)
    right = np.bincount(truth[np.asarray(correct, dtype=bool)], minlength=num_classes)
    return [Accuracy(int(r), int(c)) for r, c in zip(right, count, strict=True)]


def wilson(right: int, count: int, z: float = Z_TWO_SIDED) -> tuple[float, float]:
    """Wilson score interval of a rate, in percent.

    With ``z=Z_ONE_SIDED`` each end is a one-sided 95 % bound.  Raises ValueError without images.
    """
    if count < 1 or not 0 <= right <= count:
        raise ValueError(f"{right} of {count} is not a rate")
    rate = right / count
    centre = rate + z * z / (2 * count)
    half = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    low = 0.0 if right == 0 else (centre - half) / scale
    high = 1.0 if right == count else (centre + half) / scale
    return 100 * low, 100 * high


def h_mean(drop: float, retain: float) -> float:
    """The paper's H = 2 * drop * retain / (drop + retain), in percent.

    Args:
        drop: accuracy on forgotten classes before minus after, in points; a negative drop counts as 0.
        retain: accuracy on retained classes after, in percent.
    """
    drop = max(drop, 0.0)
    return 2 * drop * retain / (drop + retain) if drop + retain > 0 else 0.0


def confusion_matrix(labels: ArrayLike, predictions: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    """Counts, int64 [K, K]: row = true class, column = predicted class."""
    flat = np.asarray(labels, dtype=np.int64) * num_classes + np.asarray(predictions, dtype=np.int64)
    return np.bincount(flat, minlength=num_classes * num_classes).reshape(num_classes, num_classes)


@dataclass(frozen=True)
class Plausibility:
    """Whether accuracy makes sense: Cohen's kappa, and the class order that would fit better.

    ``order_gain`` is in points of accuracy; ``swapped`` holds (class, class it is mostly predicted as).
    """

    accuracy: float
    kappa: float
    order_gain: float
    swapped: tuple[tuple[int, int], ...]

    @property
    def near_chance(self) -> bool:
        return self.kappa < NEAR_CHANCE

    @property
    def wrong_order(self) -> bool:
        return bool(self.swapped)


def plausibility(confusion: NDArray[np.int64], active: Sequence[int]) -> Plausibility:
    """Judge a confusion matrix over the classes not forgotten so far.

    Chance is what the marginals alone would give (Cohen's kappa), so a model that always answers the largest class
    counts as guessing.  The order is wrong when a permutation of the active classes wins more than 10 points, and the
    images of the classes it moves do go mostly to their new places (small test sets permute by accident).

    Raises ValueError when the active classes have no images.
    """
    from scipy.optimize import linear_sum_assignment

    index = np.asarray(list(active), dtype=np.int64)
    rows = confusion[index]
    square = rows[:, index]
    total = rows.sum()
    if total == 0:
        raise ValueError("no images of the active classes")
    right = np.trace(square)
    chance = float(rows.sum(axis=1) @ square.sum(axis=0)) / float(total) ** 2
    acc = right / total
    kappa = 1.0 if chance >= 1 else (acc - chance) / (1 - chance)
    _, place = linear_sum_assignment(square, maximize=True)
    moved = np.flatnonzero(place != np.arange(len(index)))
    won = square[moved, place[moved]].sum()
    gain = 100.0 * (won - square[moved, moved].sum()) / total
    mostly = 2 * won > rows[moved].sum()
    swapped: tuple[tuple[int, int], ...] = ()
    if gain > ORDER_GAIN and mostly:
        clear = [i for i in moved if square[i, place[i]] > square[i, i]]
        swapped = tuple((int(index[i]), int(index[place[i]])) for i in clear)
    return Plausibility(float(100 * acc), float(kappa), float(gain), swapped)


def check_plausible(confusion: NDArray[np.int64], active: Sequence[int], class_names: Sequence[str]) -> Plausibility:
    """``plausibility``, or RequestError ``class_order`` or ``implausible_accuracy`` where it makes no sense."""
    found = plausibility(confusion, active)
    if found.wrong_order:
        pairs = [f"'{class_names[a]}' are mostly predicted as '{class_names[b]}'" for a, b in found.swapped]
        more = f", and {len(pairs) - 3} more classes" if len(pairs) > 3 else ""
        listed = ", of ".join(pairs[:3]) + more
        raise RequestError(
            f"The class order looks wrong (accuracy {found.accuracy:.1f} %): images of {listed}.",
            "Give the names in the model's index order: --class-names FILE, one per line.",
            "class_order",
        )
    if found.near_chance:
        raise RequestError(
            f"The model is near chance on this data (accuracy {found.accuracy:.1f} %, kappa {found.kappa:.2f}).",
            "Give the names in the model's index order (--class-names FILE), and check --mean, --std and --img-size.",
            "implausible_accuracy",
        )
    return found

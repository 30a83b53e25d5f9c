"""Gates: an erasure is published only if it forgets and retains, judged by one-sided 95 % bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gsforget.errors import RequestError
from gsforget.metrics import Z_ONE_SIDED, accuracy, of_classes, wilson

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Gate:
    """One measured promise, in percent or points: breached when ``bound``, a lower 95 % bound, exceeds ``threshold``.

    ``class_index`` names the class that decides, where the gate is about the worst one.
    """

    name: str
    value: float
    bound: float
    threshold: float
    passed: bool
    class_index: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_gates(
    correct_before: ArrayLike,
    correct_after: ArrayLike,
    labels: ArrayLike,
    forget: Sequence[int],
    retained: Sequence[int],
    old: Sequence[int] = (),
    max_forget_acc: float = 1.0,
    max_retain_drop: float = 1.0,
    max_class_drop: float = 10.0,
) -> list[Gate]:
    """Judge one erasure on the same test images before and after.

    Args:
        correct_before, correct_after: bool [N], on unmasked logits.
        labels: int [N].
        forget, retained, old: class indices of this request, of the classes never forgotten, of earlier requests.
        max_forget_acc: percent; max_retain_drop, max_class_drop: points.

    Returns:
        Gates ``forget_acc``, ``retain_drop``, ``class_drop`` and, where earlier classes have test images, ``old_acc``.

    Raises:
        RequestError: ``no_test_images`` when the forgotten or the retained classes have none.
    """
    after, truth = np.asarray(correct_after, bool), np.asarray(labels)
    forgotten = of_classes(truth, forget)
    _check_images(forgotten, "forgotten")
    limits = max_forget_acc, max_retain_drop, max_class_drop
    return [
        accuracy_gate("forget_acc", after, forgotten, max_forget_acc),
        *retention_gates(correct_before, after, truth, retained, old, *limits),
    ]


def retention_gates(
    correct_before: ArrayLike,
    correct_after: ArrayLike,
    labels: ArrayLike,
    retained: Sequence[int],
    old: Sequence[int] = (),
    max_forget_acc: float = 1.0,
    max_retain_drop: float = 1.0,
    max_class_drop: float = 10.0,
) -> list[Gate]:
    """The gates of `evaluate_gates` but for ``forget_acc``: what stays, and what earlier requests forgot."""
    before, after, truth = np.asarray(correct_before, bool), np.asarray(correct_after, bool), np.asarray(labels)
    kept = of_classes(truth, retained)
    _check_images(kept, "retained")
    gates = [drop_gate("retain_drop", before[kept], after[kept], max_retain_drop)]
    present = [k for k in sorted(retained) if (truth == k).any()]
    drops = [drop_gate("class_drop", before[truth == k], after[truth == k], max_class_drop, k) for k in present]
    gates.append(max(drops, key=lambda gate: (gate.bound, gate.value)))
    earlier = of_classes(truth, old)
    if earlier.any():
        gates.append(accuracy_gate("old_acc", after, earlier, max_forget_acc))
    return gates


def _check_images(where: NDArray[np.bool_], name: str) -> None:
    if not where.any():
        raise RequestError(
            f"The test split holds no images of the {name} classes.", "Add some under test/<class>/.", "no_test_images"
        )


def paired_drop(before: ArrayLike, after: ArrayLike, shows: ArrayLike | None = None) -> tuple[float, float]:
    """Loss of accuracy on the same images, in points, and its lower one-sided 95 % bound.

    With b images that turned wrong and c that turned right of n, drop = (b - c) / n.  The bound is Wald's with half an
    image added to each cell of the 2 x 2 table (Agresti and Min, Statistics in Medicine 24, 2005), so that a single
    image proves nothing: d - z sqrt(b' + c' - (b' - c')² / n') / n' with b' = b + 1/2, c' = c + 1/2, n' = n + 2,
    d = (b - c) / n'.  Of several views an image's loss x_i is their mean, in [-1, 1], and b + c becomes the sum of x_i²,
    b - c that of x_i: views of one image err together.

    Args:
        before, after: bool [N].
        shows: int [N], which image each is a view of, all with as many views; None: each is an image by itself.

    Raises:
        ValueError: there are no images.
    """
    first, second = np.asarray(before, bool), np.asarray(after, bool)
    if not len(first) or len(first) != len(second):
        raise ValueError("before and after must hold the same images, at least one")
    lost = first.astype(float) - second
    if shows is not None:
        _, image, views = np.unique(shows, return_inverse=True, return_counts=True)
        lost = np.bincount(image, lost) / views
    n, total = len(lost), float(lost.sum())
    deviation = math.sqrt(float((lost**2).sum()) + 1 - total**2 / (n + 2)) / (n + 2)
    drop = total / n
    return 100 * drop, 100 * min(drop, total / (n + 2) - Z_ONE_SIDED * deviation)


def accuracy_gate(name: str, after: NDArray[np.bool_], where: NDArray[np.bool_], threshold: float) -> Gate:
    """Accuracy in percent over the images ``where`` (at least one), judged by its lower bound."""
    measured = accuracy(after, where)
    bound, _ = wilson(measured.right, measured.count, Z_ONE_SIDED)
    return Gate(name, 100.0 * measured.right / measured.count, bound, threshold, bound <= threshold)


def drop_gate(
    name: str, before: NDArray[np.bool_], after: NDArray[np.bool_], threshold: float, class_index: int | None = None
) -> Gate:
    """Loss of accuracy in points on the same images (at least one), judged by its lower bound."""
    value, bound = paired_drop(before, after)
    return Gate(name, value, bound, threshold, bound <= threshold, class_index)

"""Same-class membership inference: can images used in training be told from never-used images of the same classes?

The score of an image is its logit-scaled confidence log p_y - log(1 - p_y), whose order is that of the loss but which
does not saturate.  Only pairs of the same class are compared, so that easy and hard classes with different numbers of
images are not mistaken for memory.  Both directions count: an image whose loss is suspiciously high is found out too.
Test images are what the model never saw, so 0.5 is the aim whatever the accuracy.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gsforget.metrics import Z_TWO_SIDED

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

FPR = 0.01
FAR = 1e9  # stands for infinite scores, which a masked head gives


@dataclass(frozen=True)
class MembershipResult:
    """AUC (0 to 1) with its two-sided 95 % interval, and the true positive rate at a false positive rate of ``fpr``.

    ``tpr`` is the better of both directions; without any memory it is about ``fpr``.  ``decisive``: whether so many images
    could show memory at all, that is, whether even an AUC of 1 would differ from guessing.
    """

    auc: float
    low: float
    high: float
    tpr: float
    members: int
    nonmembers: int
    fpr: float = FPR
    decisive: bool = True

    @property
    def leak(self) -> float:
        """|AUC - 1/2|, 0 to 0.5: memory in either direction."""
        return abs(self.auc - 0.5)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def losses(logits: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """Cross-entropy per image in nats, float64 [N], of logits [N, K] and labels int [N]."""
    values, truth = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    return _logsumexp(values) - values[np.arange(len(truth)), truth]


def confidences(logits: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """Logit-scaled confidence log p_y - log(1 - p_y) = z_y - logsumexp of the others, float64 [N] (arXiv 2112.03570)."""
    values, truth = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    rows = np.arange(len(truth))
    others = values.copy()
    others[rows, truth] = -np.inf
    return values[rows, truth] - _logsumexp(others)


def auc(members: ArrayLike, nonmembers: ArrayLike) -> float:
    """Probability that a member scores above a non-member, ties counting one half (Mann and Whitney); 0 to 1.

    Raises ValueError where one side is empty or holds NaN.
    """
    inside, outside = _scores(members), np.sort(_scores(nonmembers))
    below, upto = np.searchsorted(outside, inside, "left"), np.searchsorted(outside, inside, "right")
    return float((below + upto).sum() / (2 * len(inside) * len(outside)))


def tpr_at_fpr(members: ArrayLike, nonmembers: ArrayLike, fpr: float = FPR) -> float:
    """Largest share of members above a threshold that at most ``fpr`` of the non-members exceed; 0 to 1.

    Below 1 / fpr non-members no false alarm is allowed at all.
    """
    inside, outside = _scores(members), np.sort(_scores(nonmembers))[::-1]
    allowed = math.floor(fpr * len(outside) + 1e-9)
    return float((inside > outside[allowed]).mean()) if allowed < len(outside) else 1.0


def membership(
    members: ArrayLike,
    nonmembers: ArrayLike,
    member_labels: ArrayLike | None = None,
    nonmember_labels: ArrayLike | None = None,
    fpr: float = FPR,
) -> MembershipResult:
    """Compare scores of training images with scores of test images of the same classes.

    Args:
        members, nonmembers: float [M], [N], higher = more likely a member, e.g. `confidences`.
        member_labels, nonmember_labels: int [M], [N]; None where all images are of one class.

    Returns:
        AUC over pairs of the same class; for the rate, scores are taken relative to the median non-member of the class.
        Classes that lack members or non-members do not count.

    Raises:
        ValueError: no class has both.
    """
    inside, outside = _scores(members), _scores(nonmembers)
    if member_labels is None or nonmember_labels is None:
        strata = [(inside, outside)]
    else:
        first, second = np.asarray(member_labels), np.asarray(nonmember_labels)
        strata = [(inside[first == k], outside[second == k]) for k in np.intersect1d(first, second)]
    if not strata:
        raise ValueError("no class has both members and non-members")
    pairs = np.array([len(a) * len(b) for a, b in strata], dtype=np.float64)
    weights = pairs / pairs.sum()
    value = float(weights @ np.array([auc(a, b) for a, b in strata]))
    counts = [(len(a), len(b)) for a, b in strata]
    low, high = auc_interval(value, counts)
    decisive = auc_interval(1.0, counts)[0] > 0.5
    level = [np.median(b) for _, b in strata]
    a = np.concatenate([s[0] - m for s, m in zip(strata, level)])
    b = np.concatenate([s[1] - m for s, m in zip(strata, level)])
    rate = max(tpr_at_fpr(a, b, fpr), tpr_at_fpr(-a, -b, fpr))
    return MembershipResult(value, low, high, rate, len(a), len(b), fpr, decisive)


def auc_interval(value: float, counts: list[tuple[int, int]], z: float = Z_TWO_SIDED) -> tuple[float, float]:
    """Interval of an AUC over pairs within strata of (members, non-members): the score interval.

    Newcombe's method 5 (Statistics in Medicine 25, 2006): the values t with |value - t| <= z sqrt(V(t)), V being Hanley
    and McNeil's variance t (1 - t) (1 + n* (1 - t) / (2 - t) + n* t / (1 + t)) / (m n), n* = (m + n) / 2 - 1.  It does
    not collapse at 0 and 1; with one pair it is Wilson's.  Strata add up with the squares of their share of the pairs.
    """
    total = sum(m * n for m, n in counts)

    def outside(t: float) -> bool:
        variance = 0.0
        for m, n in counts:
            extra = ((m + n) / 2 - 1) * ((1 - t) / (2 - t) + t / (1 + t))
            variance += m * n * t * (1 - t) * (1 + extra) / total**2
        return (value - t) ** 2 > z * z * variance

    def end(wrong: float) -> float:
        right = value
        if not outside(wrong):
            return wrong
        for _ in range(60):
            middle = (wrong + right) / 2
            wrong, right = (middle, right) if outside(middle) else (wrong, middle)
        return right

    return (0.0 if value <= 0 else end(0.0)), (1.0 if value >= 1 else end(1.0))


def _scores(values: ArrayLike) -> NDArray[np.float64]:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or not len(scores) or np.isnan(scores).any():
        raise ValueError("scores must be a non-empty list of numbers without NaN")
    return scores.clip(-FAR, FAR)


def _logsumexp(values: NDArray[np.float64]) -> NDArray[np.float64]:
    top = values.max(axis=1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):  # log(0) = -inf: all of them impossible
        return (np.log(np.exp(values - top).sum(axis=1, keepdims=True)) + top)[:, 0]

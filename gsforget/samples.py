"""Forgetting single images: which test images stand for never having been seen, and the evidence by membership.

Half of the test images of the classes concerned say what never having been seen looks like; they choose the target and
are measured nowhere else.  The other half are what the listed images are compared with in the end.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gsforget.audit.membership import MembershipResult, confidences, membership
from gsforget.errors import RequestError
from gsforget.gates import Gate
from gsforget.metrics import Z_TWO_SIDED, Accuracy, accuracy, predict

if TYPE_CHECKING:
    from torch import Tensor

SETTLE_STEPS = 400  # fixed, for no validation image tells when single images are forgotten: they are all learned from
NOT_TESTED = (
    "single images: that they cannot be told from images never trained on is shown for one attack on the model's answers "
    "(same-class membership inference by confidence); this is weaker evidence than forgetting a class, and says nothing "
    "of attacks with shadow models or of the features"
)
EARLIER = "images forgotten singly by earlier requests: they are left out of training but not measured again"


def set_aside(
    labels: NDArray[np.int64], classes: list[int], names: list[str], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of test images, int64 and sorted: to set the target by, and to measure with.

    Half of the images of each class of `classes`, rounded down, are set aside; all others are measured.
    Raises RequestError ``too_few_test_images`` where a class has fewer than two.
    """
    aside: list[int] = []
    for k in classes:
        rows = np.random.default_rng([seed, k]).permutation(np.flatnonzero(labels == k))
        if len(rows) < 2:
            raise RequestError(
                f"'{names[k]}' has {len(rows)} test image(s); to tell whether single images are forgotten, two at least "
                "must show what a never-seen image looks like.",
                f"Add images that the model was not trained on under test/{names[k]}.",
                "too_few_test_images",
            )
        aside += rows[: len(rows) // 2].tolist()
    chosen = np.sort(np.asarray(aside, dtype=np.int64))
    return chosen, np.setdiff1d(np.arange(len(labels), dtype=np.int64), chosen)


@dataclass(frozen=True)
class Answers:
    """Logits of one model on the listed images [N, K] and on held-out images of the same classes [M, K]."""

    listed: Tensor
    held_out: Tensor


@dataclass(frozen=True)
class SampleResult:
    """What became of the listed images.

    Attributes:
        labels, said_before, said_after: int64 [N] of the listed images.
        before, after: same-class membership inference, listed images against held-out ones.
        noise: how far from 1/2 the AUC of images without any memory lies in 95 % of cases at most.
        set_aside: test images that set the target.
        sha256: of the listed images, kept in request.json so that later requests leave them out of training.
    """

    labels: NDArray[np.int64]
    said_before: NDArray[np.int64]
    said_after: NDArray[np.int64]
    before: MembershipResult
    after: MembershipResult
    noise: float
    set_aside: int
    sha256: list[str]

    @property
    def accuracies(self) -> tuple[Accuracy, Accuracy]:
        """On the listed images, before and after."""
        return accuracy(self.said_before == self.labels), accuracy(self.said_after == self.labels)

    def gate(self) -> Gate:
        """How far the attack's AUC is from 1/2, which memory and its reversal both are.

        Passed within the noise, or where at most half of the memory is left; never where it turned into its reverse.
        """
        allowed = self.noise
        if self.after.auc >= 0.5:
            allowed = max(allowed, (self.before.auc - 0.5) / 2)
        return Gate("membership", self.after.leak, self.after.leak, allowed, self.after.leak <= allowed)

    def warnings(self) -> list[str]:
        """What the evidence cannot show: one sentence, or none."""
        if self.before.leak > self.noise:
            return []
        return [
            f"The attack does not find the listed images in the model before the request either (AUC {self.before.auc:.2f}, "
            f"{self.noise:.2f} of 0.5 is chance with so few images): that it does not find them afterwards shows little."
        ]

    def to_json(self) -> dict[str, Any]:
        first, second = self.accuracies
        return {
            "images": len(self.labels),
            "accuracy": {"before": first.to_json(), "after": second.to_json()},
            "membership": {"before": self.before.to_json(), "after": self.after.to_json()},
            "noise": self.noise,
            "set_aside": self.set_aside,
        }


def judge(
    labels: NDArray[np.int64],
    held_labels: NDArray[np.int64],
    before: Answers,
    after: Answers,
    set_aside: int,
    sha256: list[str],
) -> SampleResult:
    """Compare listed images (labels int64 [N]) with held-out images of the same classes (int64 [M])."""
    results = [
        membership(confidences(answers.listed, labels), confidences(answers.held_out, held_labels), labels, held_labels)
        for answers in (before, after)
    ]
    return SampleResult(
        labels,
        predict(before.listed),
        predict(after.listed),
        results[0],
        results[1],
        auc_noise(labels, held_labels),
        set_aside,
        sha256,
    )


def auc_noise(labels: NDArray[np.int64], held_labels: NDArray[np.int64]) -> float:
    """How far from 1/2 a same-class AUC lies by chance, 95 %: the exact variance of Mann and Whitney's statistic.

    Over m listed and n held-out images of one class it is (m + n + 1) / (12 m n); classes count by their pairs.
    """
    counts = [(int((labels == k).sum()), int((held_labels == k).sum())) for k in np.unique(labels)]
    total = sum(m * n for m, n in counts)
    return Z_TWO_SIDED * math.sqrt(sum(m * n * (m + n + 1) / 12 for m, n in counts)) / total


def copies_in_test(test_paths: list[Path], test_sha256: list[str], listed: Collection[str]) -> list[str]:
    """A warning where listed images lie among the test images as well: they are no example of never having been seen."""
    same = [path for path, digest in zip(test_paths, test_sha256) if digest in listed]
    if not same:
        return []
    first = f"{same[0].parent.name}/{same[0].name}"
    return [
        f"{len(same)} of the listed images lie in the test folder as well (the first is {first}): the model was trained on "
        "them, and they blur the comparison. Remove them from the test folder."
    ]

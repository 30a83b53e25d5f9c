"""Open-set figures of embeddings: verification, identification, consistency, misattribution.  Pure functions of arrays.

Embeddings are float [N, d] of length 1, identities int [N].  A pair or a probe is accepted where its cosine is above a
threshold.  Thresholds come from impostors, pairs of different retained people: at most a share FAR of them is accepted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gsforget.metrics import Z_TWO_SIDED, wilson

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]
    Ints = NDArray[np.integer]

FAR = 1e-3
RESAMPLES = 1000


@dataclass(frozen=True)
class Threshold:
    """Where pairs begin to be accepted.

    Attributes:
        cosine: pairs above it are accepted.
        far: share of the impostors that is; asked: what was asked for, smaller where there are too few impostors.
        impostors: how many pairs it was taken from.
    """

    cosine: float
    far: float
    asked: float
    impostors: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Rate:
    """``right`` of ``count``, with the 95 % interval of its mean over identities, by resampling them; percent."""

    right: int
    count: int
    low: float | None
    high: float | None

    @property
    def percent(self) -> float | None:
        return 100 * self.right / self.count if self.count else None

    def to_json(self) -> dict[str, Any]:
        return {"percent": self.percent, "right": self.right, "count": self.count, "low": self.low, "high": self.high}


def pairs(embeddings: Floats, identities: Ints) -> tuple[Floats, Ints, Floats]:
    """Cosines of all pairs of images: genuine ones, the identity of each, and impostors' (different identities)."""
    cosines = np.asarray(embeddings, np.float64) @ np.asarray(embeddings, np.float64).T
    first, second = np.triu_indices(len(cosines), 1)
    values, same = cosines[first, second], identities[first] == identities[second]
    return values[same], identities[first[same]], values[~same]


def threshold(impostors: Floats, far: float = FAR) -> Threshold:
    """The lowest cosine above which at most a share `far` of the impostors lies.

    With fewer than 1 / far of them, the smallest rate that they support, one in all of them, is taken instead.
    Raises ValueError without impostors.
    """
    if not len(impostors):
        raise ValueError("a threshold needs impostors")
    accepted = max(1, math.floor(far * len(impostors) + 1e-9))
    ordered = np.sort(impostors)[::-1]
    cosine = float(ordered[accepted]) if accepted < len(ordered) else -1.0
    return Threshold(cosine, float((impostors > cosine).mean()), far, len(impostors))


def accept_rate(genuine: Floats, identities: Ints, at: Threshold, seed: int = 0) -> Rate:
    """TAR: the share of genuine pairs above a threshold; `identities` says whose each pair is."""
    return rate(genuine > at.cosine, identities, seed)


def rate(right: NDArray[np.bool_], identities: Ints, seed: int = 0) -> Rate:
    """A share of bool [N], with the interval that resampling whole identities gives: their images are no independent trials."""
    present = np.unique(identities)
    count = np.array([(identities == k).sum() for k in present])
    hits = np.array([right[identities == k].sum() for k in present])
    low = high = None
    if len(present) > 1:
        drawn = np.random.default_rng(seed).integers(0, len(present), (RESAMPLES, len(present)))
        shares = 100 * hits[drawn].sum(1) / count[drawn].sum(1)
        low, high = (float(v) for v in np.percentile(shares, (2.5, 97.5)))
    return Rate(int(right.sum()), len(right), low, high)


def difference(first: Floats, first_ids: Ints, second: Floats, second_ids: Ints, seed: int = 0) -> dict[str, float]:
    """Mean of `first` minus mean of `second`, with the 95 % interval by resampling identities on both sides."""
    rng = np.random.default_rng(seed)

    def resampled(values: Floats, ids: Ints) -> Floats:
        present = np.unique(ids)
        sums = np.array([values[ids == k].sum() for k in present], np.float64)
        counts = np.array([(ids == k).sum() for k in present])
        drawn = rng.integers(0, len(present), (RESAMPLES, len(present)))
        return sums[drawn].sum(1) / counts[drawn].sum(1)

    spread = resampled(first, first_ids) - resampled(second, second_ids)
    low, high = np.percentile(spread, (2.5, 97.5))
    return {"value": float(np.mean(first) - np.mean(second)), "low": float(low), "high": float(high)}


def templates(embeddings: Floats, identities: Ints) -> tuple[Floats, Ints]:
    """One template per identity, the mean of its embeddings at length 1: [M, d], and the sorted identities [M]."""
    present = np.unique(identities)
    means = np.stack([embeddings[identities == k].mean(0) for k in present])
    return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12), present


def halves(identities: Ints) -> NDArray[np.bool_]:
    """Which images to enrol, bool [N]: of each identity the first half, rounded up; the others are probes."""
    enrolled = np.zeros(len(identities), bool)
    for k in np.unique(identities):
        rows = np.flatnonzero(identities == k)
        enrolled[rows[: (len(rows) + 1) // 2]] = True
    return enrolled


def rank_one(probes: Floats, identities: Ints, gallery: Floats, gallery_ids: Ints) -> NDArray[np.bool_]:
    """Whether the template nearest to each probe is its own identity's, bool [N]."""
    if not len(probes):
        return np.zeros(0, bool)
    return gallery_ids[(probes @ gallery.T).argmax(1)] == identities


def mistaken_for(probes: Floats, gallery: Floats, gallery_ids: Ints, at: Threshold) -> Ints:
    """As whom each probe is identified in a gallery: the nearest identity, or -1 where none is above the threshold."""
    cosines = probes @ gallery.T
    return np.where(cosines.max(1) > at.cosine, gallery_ids[cosines.argmax(1)], -1)


@dataclass(frozen=True)
class Mistaken:
    """A person who is not in the gallery: ``most`` of ``count`` images are identified as one and the same ``other``."""

    person: int
    other: int
    most: int
    count: int

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's, 95 %, in percent."""
        return wilson(self.most, self.count, Z_TWO_SIDED)


def mistaken(said: Ints, identities: Ints) -> list[Mistaken]:
    """Per person, the retained identity that most of their images are taken for, from `mistaken_for`."""
    found = []
    for k in np.unique(identities):
        mine = said[identities == k]
        others, counts = np.unique(mine[mine >= 0], return_counts=True)
        first = int(counts.argmax()) if len(counts) else -1
        one = (int(others[first]), int(counts[first])) if first >= 0 else (-1, 0)
        found.append(Mistaken(int(k), one[0], one[1], len(mine)))
    return found


def worst(people: list[Mistaken]) -> Mistaken:
    """The one of whom the largest share is taken for one other person."""
    return max(people, key=lambda m: (m.most / m.count, m.count))


def consistency(genuine: Floats, identities: Ints) -> Mapping[int, float]:
    """Mean cosine between the images of each identity."""
    return {int(k): float(genuine[identities == k].mean()) for k in np.unique(identities)}

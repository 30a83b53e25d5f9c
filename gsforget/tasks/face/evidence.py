"""The open-set figures of one request, before and after, next to people whom the model never saw; and their gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gsforget.errors import RequestError
from gsforget.gates import Gate
from gsforget.tasks.face import verification as v

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gsforget.tasks.face.verification import Mistaken, Rate, Threshold

MOST = 4000  # images of one side that are compared with each other, 8 million pairs
MAX_TAR_EXCESS = 5.0  # points by which forgotten people may verify better than never-seen ones
GROUPS = ("forget", "retain", "old", "never_seen")
FACES = "whether an image shows a face at all: the model takes every image for one, and gsforget does not detect or align faces"
GALLERY = (
    "galleries: a template of a forgotten person stays wherever it was enrolled; delete it (forget --gallery FILE "
    "does, on this machine)"
)
ONE_IMAGE = "verification of {}: nobody of them has two test images, and it compares two"
NO_NEVER_SEEN = (
    "verification against never-seen people: give --never-seen with folders of people whom the model was not trained on"
)


@dataclass(frozen=True)
class People:
    """Embeddings of one model, float [N, d], and whose they are: int [N] identities and `groups` of these."""

    embeddings: NDArray[np.floating]
    identities: NDArray[np.integer]
    groups: dict[str, list[int]]

    def of(self, group: str) -> tuple[NDArray[np.floating], NDArray[np.integer]]:
        """A group's images, few enough to compare each with each."""
        mine = np.flatnonzero(np.isin(self.identities, self.groups[group]))
        each = max(2, MOST // max(1, len(self.groups[group])))
        kept = [rows[:each] for k in self.groups[group] if len(rows := mine[self.identities[mine] == k])]
        rows = np.sort(np.concatenate(kept)) if kept else mine
        return self.embeddings[rows], self.identities[rows]


@dataclass(frozen=True)
class OpenSet:
    """What one model makes of people, by group; None where a group has no pairs or no images.

    Attributes:
        threshold: for pairs; gallery_threshold: for an image and a template.  Both from retained people.
        tar: of genuine pairs; rank_one: of probes in a gallery of the retained people and of the group itself.
        cosine: mean cosine of two images of a person.
        genuine: cosines and owners of each group's pairs.
        mistaken: whom images of people who are in no gallery are taken for, in a gallery of the retained people.
    """

    threshold: Threshold
    gallery_threshold: Threshold
    tar: dict[str, Rate | None]
    rank_one: dict[str, Rate | None]
    cosine: dict[str, float | None]
    genuine: dict[str, tuple[NDArray[np.floating], NDArray[np.integer]]]
    mistaken: dict[str, list[Mistaken]]


def open_set(people: People) -> OpenSet:
    """All figures of one model.  Raises RequestError ``few_people`` where fewer than two retained people have images."""
    kept, kept_ids = people.of("retain")
    if len(np.unique(kept_ids)) < 2:
        raise RequestError(
            "Whom a model tells apart shows on two retained people or more with test images, and here there would be "
            f"{len(np.unique(kept_ids))}.",
            "Keep more people, or add test images of them.",
            "few_people",
        )
    _, _, impostors = v.pairs(kept, kept_ids)
    at = v.threshold(impostors)
    enrolled = v.halves(kept_ids)
    gallery, gallery_ids = v.templates(kept[enrolled], kept_ids[enrolled])
    probes, probe_ids = kept[~enrolled], kept_ids[~enrolled]
    if not len(probes):
        probes, probe_ids = kept, kept_ids  # one image each: it meets the other people's templates all the same
    cosines = probes @ gallery.T
    gallery_at = v.threshold(cosines[gallery_ids[None] != probe_ids[:, None]])
    found = OpenSet(at, gallery_at, {}, {}, {}, {}, {})
    for group in GROUPS:
        mine, ids = people.of(group)
        genuine, owners, _ = v.pairs(mine, ids) if len(mine) else (np.zeros(0), np.zeros(0, int), None)
        found.genuine[group] = genuine, owners
        found.tar[group] = v.accept_rate(genuine, owners, at) if len(genuine) else None
        found.cosine[group] = float(genuine.mean()) if len(genuine) else None
        found.rank_one[group] = _rank_one(mine, ids, group, gallery, gallery_ids)
        if group != "retain" and len(mine):
            found.mistaken[group] = v.mistaken(v.mistaken_for(mine, gallery, gallery_ids, gallery_at), ids)
    return found


def _rank_one(mine: Any, ids: Any, group: str, gallery: Any, gallery_ids: Any) -> Rate | None:
    first = v.halves(ids)
    if first.all():
        return None
    own, own_ids = v.templates(mine[first], ids[first])
    others = [gallery, own] if group != "retain" else [own]
    names = [gallery_ids, own_ids] if group != "retain" else [own_ids]
    right = v.rank_one(mine[~first], ids[~first], np.concatenate(others), np.concatenate(names))
    return v.rate(right, ids[~first])


@dataclass(frozen=True)
class FaceFigures:
    """Before and after; `names` by identity, those of never-seen people included."""

    before: OpenSet
    after: OpenSet
    names: Sequence[str]

    def excess(self, group: str = "forget") -> dict[str, float] | None:
        """TAR of forgotten people minus TAR of never-seen ones after the request, in points, with its 95 % interval."""
        mine, theirs = self.after.genuine[group], self.after.genuine["never_seen"]
        if not len(mine[0]) or not len(theirs[0]):
            return None
        at = self.after.threshold.cosine
        return v.difference(100.0 * (mine[0] > at), mine[1], 100.0 * (theirs[0] > at), theirs[1])

    def drop(self, group: str = "retain") -> dict[str, float] | None:
        """TAR of a group's people before minus after, each at its own threshold, over the same pairs, in points."""
        (before, owners), (after, _) = self.before.genuine[group], self.after.genuine[group]
        if not len(before):
            return None
        lost = 100.0 * (before > self.before.threshold.cosine) - 100.0 * (after > self.after.threshold.cosine)
        zero = np.zeros(1), np.zeros(1, int)
        return v.difference(lost, owners, *zero)

    def gates(self, max_retain_drop: float) -> list[Gate]:
        """What is breached beyond its bound: ``retain_tar_drop``, and with never-seen people ``forget_tar``, ``old_tar`` of
        people forgotten earlier, and ``misattribution`` of both."""
        made = []
        drop = self.drop()
        if drop is not None:
            made.append(_gate("retain_tar_drop", drop, max_retain_drop))
        for group in ("forget", "old"):
            excess = self.excess(group)
            if excess is not None:
                made.append(_gate(f"{group}_tar", excess, MAX_TAR_EXCESS))
        mistaken = self.after.mistaken
        mine, theirs = [*mistaken.get("forget", []), *mistaken.get("old", [])], mistaken.get("never_seen")
        if mine and theirs:
            first, second = v.worst(mine), v.worst(theirs)
            value = 100 * (first.most / first.count - second.most / second.count)
            bound = first.interval[0] - second.interval[1]
            made.append(Gate("misattribution", value, bound, 0.0, bound <= 0.0, first.person))
        return made

    def warnings(self, max_drop: float) -> list[str]:
        """What no gate watches, and whoever enrols new people later should know: never-seen people verify worse."""
        lost = self.drop("never_seen")
        before, after = self.before.tar["never_seen"], self.after.tar["never_seen"]
        if lost is None or before is None or after is None or lost["low"] <= max_drop:
            return []
        return [
            f"People whom the model never saw verify less often than before: {before.percent:.1f} % of their pairs before, "
            f"{after.percent:.1f} % after. No gate watches this; try whom you enrol later."
        ]

    def to_json(self) -> dict[str, Any]:
        """The `face` section of the document and of metrics.json; percent, cosines from -1 to 1."""
        sides = {"before": self.before, "after": self.after}
        by_group: dict[str, Any] = {}
        for group in GROUPS:
            by_group[group] = {
                when: {
                    "tar": rate.to_json() if (rate := side.tar[group]) else None,
                    "rank_one": rate.to_json() if (rate := side.rank_one[group]) else None,
                    "cosine": side.cosine[group],
                }
                for when, side in sides.items()
            }
        return {
            "threshold": {when: side.threshold.to_json() for when, side in sides.items()},
            **by_group,
            "tar_excess": self.excess(),
            "retain_tar_drop": self.drop(),
            "never_seen_tar_drop": self.drop("never_seen"),
            "misattribution": {
                group: {when: self._worst(side.mistaken.get(group)) for when, side in sides.items()}
                for group in GROUPS
                if group != "retain"
            },
        }

    def _worst(self, people: list[Mistaken] | None) -> dict[str, Any] | None:
        if not people:
            return None
        one = v.worst(people)
        low, high = one.interval
        return {
            "mean": 100 * sum(m.most for m in people) / sum(m.count for m in people),
            "person": self.names[one.person],
            "taken_for": self.names[one.other] if one.other >= 0 else None,
            "percent": 100 * one.most / one.count,
            "images": one.count,
            "low": low,
            "high": high,
        }

    def not_tested(self) -> list[str]:
        said = [FACES]
        groups = {"forget": "the forgotten", "old": "the earlier forgotten", "never_seen": "the never-seen"}
        alone = [
            f"{title} people"
            for group, title in groups.items()
            if group in self.after.mistaken and not len(self.after.genuine[group][0])
        ]
        said += [ONE_IMAGE.format(title) for title in alone]
        if "never_seen" not in self.after.mistaken:
            said.append(NO_NEVER_SEEN)
        at = self.after.threshold
        if at.impostors * at.asked < 1:
            said.append(
                f"a false accept rate of {at.asked:g}: {at.impostors} pairs of different people support no less than "
                f"{1 / at.impostors:.2g}, which was taken instead"
            )
        return said


def _gate(name: str, found: dict[str, float], threshold: float) -> Gate:
    return Gate(name, found["value"], found["low"], threshold, found["low"] <= threshold)

"""What became of each kind of object: AP before and after, gates with bounds from a bootstrap over images, pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from gsforget.errors import RequestError
from gsforget.export.device.detections import Found, to_corners
from gsforget.gates import Gate
from gsforget.metrics import h_mean
from gsforget.tasks.base import Measured, Picture, Seen
from gsforget.tasks.detect.ap import Matches, bootstrap, match, overlaps
from gsforget.tasks.detect.coco import Scene
from gsforget.tasks.detect.evaluate import coco_ap
from gsforget.tasks.detect.losses import found_by

if TYPE_CHECKING:
    from gsforget.request import Request
    from gsforget.source import Source
    from gsforget.tasks.detect.families import Family

PROBES = ("linear_probe", "linear_probe_excess", "prototype_attack", "mia_auc")
SHOWN = 0.3  # score from which a detection counts in the picture of answers
LEAST_AP50 = 5.0  # of the model before, over all kinds, below which the request is refused
NOT_TESTED = (
    f"{', '.join(PROBES[:-1])} and {PROBES[-1]}: shown is that the detector no longer finds the forgotten kinds, not that "
    "nothing of them is left in its features; gsforget audit --tier standard probes these, without membership",
    "relearning, how fast the forgotten kinds come back when somebody trains the detector on them: gsforget audit --tier full",
)


@dataclass(frozen=True)
class Figures:
    """One request on the test scenes.

    Attributes:
        forget, retain, old: class indices of this request, never forgotten, and of earlier requests.
        before: what the model before the request made of the scenes.
    """

    source: Source
    request: Request
    family: Family
    scenes: list[Scene]
    forget: Sequence[int]
    retain: Sequence[int]
    old: Sequence[int]
    before: Seen

    @cached_property
    def kinds(self) -> list[int]:
        """That occur on the test scenes."""
        there = np.unique(np.concatenate([s.kinds[~s.crowd] for s in self.scenes]))
        return [int(k) for k in there]

    @cached_property
    def found_before(self) -> Found:
        return found_by(self.before, self.family)

    @cached_property
    def ap_before(self) -> dict[int, tuple[float, float]]:
        return coco_ap(self.found_before, self.scenes, self.kinds)

    def objects(self, kind: int) -> int:
        return int(sum((s.kinds[~s.crowd] == kind).sum() for s in self.scenes))


def check_plausible(f: Figures) -> None:
    """Refuse a detector that finds nothing, whose class order or preprocessing is likely to be wrong."""
    ap50 = [f.ap_before[k][1] for k in f.kinds if k not in f.old]
    if np.mean(ap50) < LEAST_AP50:
        raise RequestError(
            f"The detector's AP50 on the test images is {np.mean(ap50):.1f} % before anything is forgotten: the order of the "
            "class names, or the preprocessing, is likely to be wrong.",
            "Check --class-names and the model's preprocessor_config.json.",
            "implausible",
        )


def measured(f: Figures, seen: Seen) -> Measured:
    """All of it, for the documents."""
    found = found_by(seen, f.family)
    after = coco_ap(found, f.scenes, f.kinds)
    sides = {"forget": f.forget, "retain": f.retain, "old": f.old}
    role = {k: name for name, kinds in sides.items() for k in kinds}
    matches = {k: (match(f.found_before, f.scenes, k), match(found, f.scenes, k)) for k in f.kinds}
    gates = _gates(f, after, matches)
    summary = _summary(f, after)
    names = f.source.names
    classes = [
        {
            "index": k,
            "name": names[k],
            "role": role[k],
            "objects": f.objects(k),
            "before": _entry(f.ap_before.get(k)),
            "after": _entry(after.get(k)),
        }
        for k in range(len(names))
    ]
    detection = {
        "evaluator": "COCO: AP over overlaps of 0.5 to 0.95, up to 100 detections an image, nothing masked",
        **{key: summary[key] for key in summary if "ap" in key},
        "every_query": _every_query(f, seen),
        "detections": detections(f, found),
    }
    return Measured(
        summary=summary,
        classes=classes,
        images=len(f.scenes),
        gates=gates,
        picture=_picture(f, found),
        audit=dict.fromkeys(PROBES),
        sections={"task": "detect", "detection": detection},
        not_tested=_not_tested(f),
    )


def _summary(f: Figures, after: dict[int, tuple[float, float]]) -> dict[str, float | None]:
    """`metrics` of the document: AP50 of forgotten kinds and AP of retained ones stand where accuracies do."""
    means: dict[str, float | None] = {}
    for name, kinds in (("forget", f.forget), ("retain", f.retain), ("old", f.old)):
        there = [k for k in kinds if k in f.kinds]
        for when, ap in (("before", f.ap_before), ("after", after)):
            for part, key in enumerate(("ap", "ap50")):
                means[f"{name}_{key}_{when}"] = float(np.mean([ap[k][part] for k in there])) if there else None
    retained, gone = (
        means["retain_ap_after"] or 0.0,
        (means["forget_ap_before"] or 0.0) - (means["forget_ap_after"] or 0.0),
    )
    return {
        "forget_acc_before": means["forget_ap50_before"],
        "forget_acc_after": means["forget_ap50_after"],
        "retain_acc_before": means["retain_ap_before"],
        "retain_acc_after": means["retain_ap_after"],
        "old_acc_after": means["old_ap50_after"],
        "h_mean": h_mean(gone, retained),
        **means,
    }


def _gates(
    f: Figures, after: dict[int, tuple[float, float]], matches: dict[int, tuple[Matches, Matches]]
) -> list[Gate]:
    """Bounds are lower 95 % bounds, from images drawn anew."""
    t, seed = f.request.thresholds, f.request.settings.seed
    kinds = f.kinds
    drawn = [bootstrap([matches[k][when] for k in kinds], seed) for when in (0, 1)]  # [draws, kinds, overlaps]
    at = {k: i for i, k in enumerate(kinds)}

    def gone(name: str, side: Sequence[int]) -> list[Gate]:
        there = [k for k in side if k in at]
        if not there:
            return []
        value = float(np.mean([after[k][1] for k in there]))
        bound = 100 * float(np.quantile(np.nanmean(drawn[1][:, [at[k] for k in there], 0], 1), 0.05))
        return [Gate(name, value, bound, t.max_forget_acc, bound <= t.max_forget_acc)]

    kept = [k for k in f.retain if k in at]
    drops = {k: f.ap_before[k][0] - after[k][0] for k in kept}
    drop = float(np.mean(list(drops.values())))
    low = 100 * (np.nanmean(drawn[0], 2) - np.nanmean(drawn[1], 2))  # [draws, kinds]
    bound = float(np.quantile(np.nanmean(low[:, [at[k] for k in kept]], 1), 0.05))
    worst = max(kept, key=lambda k: drops[k])
    share = 0.05 / len(kept)  # the worst of many kinds: each is judged more strictly (Bonferroni)
    worst_bound = float(np.nanquantile(low[:, at[worst]], share))
    return [
        *gone("forget_ap50", f.forget),
        Gate("retain_ap_drop", drop, bound, t.max_retain_drop, bound <= t.max_retain_drop),
        Gate("class_ap_drop", drops[worst], worst_bound, t.max_class_drop, worst_bound <= t.max_class_drop, worst),
        *gone("old_ap50", f.old),
    ]


def _every_query(f: Figures, seen: Seen) -> list[dict[str, Any]]:
    """AP50 of gone kinds when each query's score for the kind is ranked, however low: what the top of the list hides."""
    figures = []
    for k in [*f.forget, *f.old]:
        if k not in f.kinds:
            continue
        found = []
        for answers in (f.before, seen):
            logits = answers.outputs.float().numpy()
            scores = logits[..., k] - (logits.max(-1) if f.family.scoring == "softmax" else 0)
            order = np.argsort(-scores, 1, kind="stable")
            boxes = np.take_along_axis(to_corners(answers.more["boxes"].float().numpy()), order[..., None], 1)
            ranked = Found(np.take_along_axis(scores, order, 1), np.full(order.shape, k), boxes)
            found.append(100 * float(match(ranked, f.scenes, k).ap()[0]))
        figures.append({"name": f.source.names[k], "before": found[0], "after": found[1]})
    return figures


def detections(f: Figures, found: Found) -> dict[str, Any]:
    """How many detections of gone kinds there are from a score of SHOWN on, before and after."""
    gone = [*f.forget, *f.old]
    counts = [int(((said.scores >= SHOWN) & np.isin(said.kinds, gone)).sum()) for said in (f.found_before, found)]
    return {"score_from": SHOWN, "of_forgotten_kinds": {"before": counts[0], "after": counts[1]}}


def _picture(f: Figures, found: Found) -> Picture:
    """What is said where forgotten objects are: the kind of the best detection on each, or nothing."""
    names = [*f.source.names, "nothing"]
    said = []
    for detections_ in (f.found_before, found):
        kinds = []
        for n, scene in enumerate(f.scenes):
            here = np.isin(scene.kinds, f.forget) & ~scene.crowd
            if not here.any():
                continue
            sure = detections_.scores[n] >= SHOWN
            edges = detections_.boxes[n][sure] * np.array([*scene.frame, *scene.frame])
            boxes = np.concatenate([edges[:, :2], edges[:, 2:] - edges[:, :2]], 1)
            shared = overlaps(boxes, scene.boxes[here], np.zeros(int(here.sum()), bool))
            for column in shared.T:
                on = np.flatnonzero(column >= 0.5)  # best score first
                kinds.append(int(detections_.kinds[n][sure][on[0]]) if len(on) else len(names) - 1)
        said.append(np.array(kinds, np.int64))
    return Picture(said[0], said[1], names, list(f.forget), "objects of the forgotten kinds (red)")


def _not_tested(f: Figures) -> list[str]:
    said = list(NOT_TESTED)
    untested = [f.source.names[k] for k in f.retain if k not in f.kinds]
    if untested:
        said.append(f"retained kinds without test objects: {', '.join(untested)}")
    lost = [k for k in f.old if k not in f.kinds]
    if lost:
        said.append(f"kinds forgotten earlier without test objects: {len(lost)}")
    return said


def _entry(ap: tuple[float, float] | None) -> dict[str, float | None]:
    return {"ap": ap[0], "ap50": ap[1]} if ap else {"ap": None, "ap50": None}

"""Quick tier: what answers and one pass of features show, without any training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gsforget.audit import answers as output
from gsforget.audit import checks, membership, probes, similarity
from gsforget.audit.checks import Check, Limits
from gsforget.gates import accuracy_gate, drop_gate
from gsforget.metrics import Accuracy, accuracy, of_classes, per_class

if TYPE_CHECKING:
    from gsforget.audit.measure import Evidence, Measured, View
    from gsforget.audit.subjects import Answers

SURE = 0.5  # probability above which an image counts as recognised as somebody else
NEIGHBOURS = 2  # retained classes nearest to each forgotten one
POINTS = 240  # of each kind in the feature map
NO_TEST = "there are no test images of {}"


def accuracy_checks(e: Evidence, limits: Limits) -> list[Check]:
    """``forget_acc``, ``old_acc``, ``forget_train_acc``, ``retain_drop`` and ``class_drop``."""
    case, test = e.case, e.subject.test
    made = [_accuracy(e, "forget_acc", "test images of the forgotten classes", case.forget, False, limits)]
    if case.old:
        made.append(_accuracy(e, "old_acc", "test images of classes forgotten earlier", case.old, False, limits))
    made.append(
        _accuracy(
            e, "forget_train_acc", "training images of the forgotten classes", [*case.forget, *case.old], True, limits
        )
    )
    if e.original is None:
        why = "the original model is not at hand, so nothing says what was lost"
    else:
        why = NO_TEST.format("retained classes")
    kept = of_classes(test.labels, case.retained)
    if e.original is None or not kept.any():
        made.append(checks.unknown("retain_drop", "points", why, limits.max_retain_drop))
        made.append(checks.unknown("class_drop", "points", why, limits.max_class_drop))
        return made
    before, after = e.original.test.correct, test.correct
    erasures = max(1, case.sequence - e.original.side.sequence)
    drop = drop_gate("retain_drop", before[kept], after[kept], limits.max_retain_drop * erasures)
    since = f" over {erasures} erasures" if erasures > 1 else ""
    made.append(checks.of_gate(drop, "points", f"Accuracy on retained classes {_fell(drop.value)}{since}."))
    worst = max(
        (
            drop_gate("class_drop", before[test.labels == k], after[test.labels == k], limits.max_class_drop, k)
            for k in case.retained
            if (test.labels == k).any()
        ),
        key=lambda gate: (gate.bound, gate.value),
    )
    named = case.names[worst.class_index or 0]
    says = f"Of the retained classes, {named} did worst: it {_fell(worst.value)}."
    return [*made, checks.of_gate(worst, "points", says)]


def _fell(points: float) -> str:
    """A drop of accuracy in words; what rounds to nothing stayed as it was."""
    if abs(points) < 0.05:
        return "stayed as it was"
    return f"{'fell' if points > 0 else 'rose'} by {abs(points):.1f} points"


def _accuracy(e: Evidence, name: str, what: str, classes: Sequence[int], train: bool, limits: Limits) -> Check:
    def of(measured: Measured | None) -> Accuracy | None:
        if measured is None:
            return None
        found = measured.train if train else measured.test
        return accuracy(found.correct, of_classes(found.labels, classes))

    subject, original, reference = (of(m) for m in (e.subject, e.original, e.reference))
    assert subject is not None
    if not subject.count:
        return checks.unknown(name, "%", f"there are no {what}", limits.max_forget_acc)
    found = e.subject.train if train else e.subject.test
    gate = accuracy_gate(name, found.correct, of_classes(found.labels, classes), limits.max_forget_acc)
    known = reference.percent if reference and reference.count == subject.count else None
    says = f"The model names {subject.right} of {subject.count} {what} rightly."
    return checks.of_gate(gate, "%", says, original.percent if original else None, known)


def class_rows(e: Evidence) -> list[dict[str, Any]]:
    """Per class: index, name, role, and accuracy on the test images before and after."""
    case, count = e.case, len(e.case.names)
    role = {
        **dict.fromkeys(case.retained, "retain"),
        **dict.fromkeys(case.forget, "forget"),
        **dict.fromkeys(case.old, "old"),
    }

    def listed(measured: Measured | None) -> list[dict[str, Any] | None]:
        if measured is None:
            return [None] * count
        found = per_class(measured.test.correct, measured.test.labels, count)
        return [a.to_json() if a.count else None for a in found]

    before, after = listed(e.original), listed(e.subject)
    return [
        {"index": k, "name": case.names[k], "role": role[k], "before": before[k], "after": after[k]}
        for k in range(count)
    ]


def membership_check(e: Evidence) -> tuple[Check, dict[str, Any] | None]:
    """Training images of the audited classes against their test images."""

    def of(measured: Measured | None) -> membership.MembershipResult | None:
        if measured is None:
            return None
        inside, outside = (a.select(of_classes(a.labels, e.attackable)) for a in (measured.train, measured.test))
        first, second = (membership.confidences(a.logits, a.labels) for a in (inside, outside))
        return membership.membership(first, second, inside.labels, outside.labels)

    if not e.attackable:
        why = "membership needs training and test images of the forgotten classes"
        return checks.unknown("mia_auc", "auc", why, 0.5), None
    subject, original, reference = (of(m) for m in (e.subject, e.original, e.reference))
    assert subject is not None
    details = {
        name: found.to_json() if found else None
        for name, found in (("after", subject), ("original", original), ("reference", reference))
    }
    return checks.membership(subject, original, reference), details


def attack_checks(e: Evidence, views: dict[str, View | None], why: str) -> list[Check]:
    """The five-shot attacks, held against never-seen classes: the head's rows replaced, and nearest class means."""
    mean = attacks(views, five_shot, e)
    rows = attacks(views, rows_replaced, e)
    subject, reference = views["subject"], views["reference"]
    if subject is None:
        return [checks.unknown(name, "%", why) for name in ("prototype_attack", "five_shot")]
    counts = len(subject.test.labels), len(reference.test.labels) if reference else 0
    made = []
    for name, what, figures in (
        ("prototype_attack", "With five images per class put into the head, the model names", rows),
        ("five_shot", "By the nearest class mean of five images, features name", mean),
    ):
        value = figures["subject"]
        if value is None:
            made.append(checks.unknown(name, "%", "the head's weights are not known"))
        else:
            says = f"{what} {value:.1f} % of the forgotten images"
            made.append(checks.attack(name, says, value, figures["original"], figures["reference"], counts))
    return made


def attacks(views: dict[str, View | None], attack: Any, e: Evidence) -> dict[str, float | None]:
    """One attack on each view."""
    return {name: None if view is None else attack(view, e) for name, view in views.items()}


def five_shot(view: View, e: Evidence) -> float:
    return probes.five_shot(*_four(view), view.tested, seed=e.case.ask.seed)


def all_means(view: View, e: Evidence) -> float:
    return probes.nearest_class_mean(*_four(view), view.tested)


def linear_probe(view: View, e: Evidence) -> float:
    return probes.linear_probe(*_four(view), view.tested, seed=e.case.ask.seed)


def rows_replaced(view: View, e: Evidence) -> float | None:
    if view.head is None:
        return None
    assert view.train.features is not None
    assert view.test.features is not None
    attacked = of_classes(view.train.labels, view.tested)
    others = view.train.features[~attacked]
    return probes.prototype_attack(
        *view.head,
        view.train.features[attacked],
        view.train.labels[attacked],
        view.test.features,
        view.test.labels,
        view.tested,
        retained_features=others if len(others) else None,
        seed=e.case.ask.seed,
        in_use=e.case.retained,
    )


def _four(view: View) -> tuple[Any, Any, Any, Any]:
    return view.train.features, view.train.labels, view.test.features, view.test.labels


def answer_details(e: Evidence) -> dict[str, Any]:
    """Rank of the truth, top-5 accuracy, misattribution and churn, where there are test images."""
    case = e.case
    found: dict[str, Any] = {}
    gone = [*case.forget, *case.old]
    said = {"original": e.original, "after": e.subject}
    forgotten = {n: m.test.select(of_classes(m.test.labels, gone)) if m else None for n, m in said.items()}
    if len(forgotten["after"].labels):  # type: ignore[union-attr]
        ranks = {n: output.rank_of_truth(a.logits, a.labels) if a else None for n, a in forgotten.items()}
        found["rank_of_truth"] = {n: None if r is None else float(np.median(r)) for n, r in ranks.items()}
        found["top5_acc"] = {n: None if r is None else float(100 * (r <= 5).mean()) for n, r in ranks.items()}
        sinks = output.misattribution(probabilities(forgotten["after"]), SURE, case.retained)[:3]  # type: ignore[arg-type]
        found["misattribution"] = [
            {"class": case.names[k], "share": share, "mean_probability": mean} for k, share, mean in sinks
        ]
    kept = of_classes(e.subject.test.labels, case.retained)
    if e.original and kept.any():
        changed = output.churn(e.original.test.said[kept], e.subject.test.said[kept], e.subject.test.labels[kept])
        found["churn"] = {"changed": changed.changed, "negative_flips": changed.negative_flips}
    return found


def probabilities(answers: Answers) -> np.ndarray:
    """Softmax of the logits, float64 [N, K]."""
    values = answers.logits.astype(np.float64)
    exp = np.exp(values - values.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


def feature_details(e: Evidence, views: dict[str, View | None]) -> dict[str, Any]:
    """Class means in full, the shift of prototypes, neighbours, and the feature map: where the original has features."""
    found: dict[str, Any] = {}
    subject, original = views["subject"], views["original"]
    if subject is None:
        return found
    found["nearest_class_mean"] = named(attacks(views, all_means, e))
    if original is None or e.original is None:
        return found
    before, after = original.train, subject.train
    kept = [k for k in e.case.retained if (after.labels == k).any()]
    means = [probes.class_means(a.features, a.labels, [*subject.tested, *kept]) for a in (before, after)]  # type: ignore[arg-type]
    shift = similarity.prototype_shift(*means) if means[0].shape == means[1].shape else None
    count = len(subject.tested)
    if shift is not None:
        found["prototype_shift"] = {"forget": _mean(shift[:count]), "retain": _mean(shift[count:])}
        found["feature_map"] = feature_map(e.original.test, e.subject.test, e)
    near = probes.neighbours(means[0][:count], means[0][count:], NEIGHBOURS) if kept else np.zeros(0, np.int64)
    classes = [kept[i] for i in np.unique(near)]
    drops = output.class_drops(e.original.test.correct, e.subject.test.correct, e.subject.test.labels, classes)
    found["neighbours"] = [
        {"class": e.case.names[k], "drop": drop} for k, drop in sorted(drops.items(), key=lambda item: -item[1])
    ]
    return found


def feature_map(before: Answers, after: Answers, e: Evidence) -> dict[str, Any]:
    """Test images by the two directions in which a model's own features vary most (principal components), per model.

    In the original's plane a class that left it for another direction would lie among the others, as if it were gone.
    """
    rng = np.random.default_rng(e.case.ask.seed)
    rows = {
        name: np.sort(rng.permutation(np.flatnonzero(of_classes(before.labels, classes)))[:POINTS])
        for name, classes in (("forget", e.attackable), ("retain", e.case.retained))
    }
    found = {}
    for when, answers in (("before", before), ("after", after)):
        assert answers.features is not None
        values = answers.features[np.concatenate([*rows.values()])].astype(np.float64)
        centre = values.mean(axis=0)
        plane = np.linalg.svd(values - centre, full_matrices=False)[2][:2].T
        found[when] = {n: np.round((answers.features[r] - centre) @ plane, 3).tolist() for n, r in rows.items()}
    return found


def named(figures: dict[str, float | None]) -> dict[str, float | None]:
    """Figures of the views as the document names them."""
    return {"after": figures["subject"], "original": figures["original"], "reference": figures["reference"]}


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None

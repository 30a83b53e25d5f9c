"""The verdict in plain words: what was asked, whether it is gone from the answers and the features, what stays unknown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gsforget.report.markup import Html, listed, measured, number, plural, tag, verdict

# Which question a check answers, by the first of these words that its name holds.
STRANDS = (
    ("recovery", ("relearn", "interpol")),
    ("membership", ("mia", "member", "tpr")),
    ("features", ("probe", "proto", "mean", "shot", "knn", "feature", "cka", "separab", "forget_tar", "old_tar")),
    ("answers", ("forget", "old", "rank", "misattr", "answer")),
    ("kept", ("drop", "retain", "neighbour", "churn", "worst", "kept")),
)
NOUNS = {"face": ("person", "people")}  # what is forgotten, by task
HEADLINES = {
    "answers": "The evidence is against it: the model still recognises what it was asked to forget",
    "features": "Gone from the answers, but not from the features",
    "recovery": "Gone for now, but too easily learned again",
    "membership": "The model still tells which images it was trained on",
    "kept": "It forgot, but it lost more of the rest than is allowed",
    "other": "A check failed",
}


@dataclass(frozen=True)
class Strand:
    """The checks that answer one question, and the worst of their verdicts (None where there is none)."""

    checks: list[dict[str, Any]]

    @property
    def verdict(self) -> str | None:
        found = {c.get("verdict") for c in self.checks}
        return next((v for v in ("fail", "inconclusive", "pass") if v in found), None)

    def count(self, verdict: str) -> int:
        return sum(c.get("verdict") == verdict for c in self.checks)


def nouns(audit: dict[str, Any]) -> tuple[str, str]:
    """One of what the model tells apart, and several."""
    return NOUNS.get(str(audit.get("task")), ("class", "classes"))


def strand_of(name: str) -> str:
    """The question that a check answers, by its name; ``other`` for an unknown one."""
    return next((s for s, words in STRANDS if any(word in name.lower() for word in words)), "other")


def strands(audit: dict[str, Any]) -> dict[str, Strand]:
    """All strands, checks in their order; ``answers``, ``features``, ``kept`` … are always there."""
    made: dict[str, list[dict[str, Any]]] = {s: [] for s in (*(s for s, _ in STRANDS), "other")}
    for check in audit.get("checks") or []:
        made[strand_of(str(check.get("name", "")))].append(check)
    return {name: Strand(checks) for name, checks in made.items()}


@dataclass(frozen=True)
class Total:
    """Images of one role before and after: how many classes, images, and right ones (None: not measured)."""

    classes: int
    count: int
    before: int | None
    after: int | None

    def percent(self, right: int | None) -> float | None:
        return 100 * right / self.count if right is not None and self.count else None


def total(audit: dict[str, Any], role: str) -> Total:
    """The classes of a role taken together, weighted by images."""
    chosen = [c for c in audit.get("classes") or [] if c.get("role") == role]

    def right(when: str) -> int | None:
        values = [(c.get(when) or {}).get("right") for c in chosen if _images(c)]
        known = [int(v) for v in values if measured(v)]
        return sum(known) if known and len(known) == len(values) else None

    return Total(len(chosen), sum(map(_images, chosen)), right("before"), right("after"))


def _images(entry: dict[str, Any]) -> int:
    return int(
        next((m["count"] for m in (entry.get("after"), entry.get("before")) if m and measured(m.get("count"))), 0)
    )


def section(audit: dict[str, Any], history: Sequence[dict[str, Any]]) -> Html:
    """Headline, one sentence per question, and the questions side by side."""
    found = strands(audit)
    answers, features = total(audit, "forget"), found["features"]
    paragraphs = [
        _asked(audit, history),
        _answers(found["answers"], answers, total(audit, "old"), nouns(audit)[1]),
        _features(features, audit),
    ]
    for name, title, words in (
        ("recovery", "Learned again: ", _RECOVERY),
        ("membership", "Training images: ", _MEMBERSHIP),
    ):
        if (value := found[name].verdict) is not None:
            paragraphs.append(tag("p", tag("b", title), words[value]))
    paragraphs += [_kept(found["kept"], total(audit, "retain"), nouns(audit)[1]), _unknown(audit)]
    kind = audit.get("verdict") or "none"
    box = tag(
        "div",
        tag("p", verdict(audit.get("verdict"), headline(audit, found)), class_="headline"),
        tag("div", *paragraphs, class_="lead"),
        class_=f"banner {kind}",
    )
    titles = (
        ("answers", "Gone from the answers?"),
        ("features", "Gone from the features?"),
        ("recovery", "Hard to learn again?"),
        ("membership", "Training images untraceable?"),
        ("kept", "Is the rest kept?"),
    )
    cards = [
        tag("div", tag("span", title, class_="question"), _card(found[name]), class_="card") for name, title in titles
    ]
    return tag("div", box, tag("div", *cards, class_="cards"))


def headline(audit: dict[str, Any], found: dict[str, Strand]) -> str:
    """The verdict in a few words."""
    value = audit.get("verdict")
    if value == "pass" and found["features"].verdict != "pass":
        return "Gone from the answers; whether it is gone from the features was not measured"
    if value == "pass":
        return f"The evidence supports forgetting: every check of the {audit.get('tier', '')} audit passed"
    if value == "fail":
        order = ("answers", "features", "recovery", "membership", "kept", "other")
        worst = next((s for s in order if found[s].verdict == "fail"), "other")
        if worst == "features" and found["answers"].verdict != "pass":
            return f"The evidence is against it: the features still hold the forgotten {nouns(audit)[1]}"
        return HEADLINES[worst]
    if value == "inconclusive":
        return "The evidence does not settle it: nothing failed, but an important check could not be concluded"
    return "There is no verdict"


def _asked(audit: dict[str, Any], history: Sequence[dict[str, Any]]) -> Html:
    names = [str(c["name"]) for c in audit.get("classes") or [] if c.get("role") == "forget"]
    old = total(audit, "old").classes
    if not names and history:
        names = [str(n) for n in history[-1].get("classes") or []]
    one, several = nouns(audit)
    earlier = f", after {plural(old, one, several)} in earlier requests" if old else ""
    what = f"{plural(len(names), one, several)} ({listed(names)})" if names else f"{several} that are not on record"
    return tag("p", tag("b", "Asked: "), f"that the model forget {what}{earlier}.")


def _answers(strand: Strand, measured_: Total, old: Total, classes: str) -> Html:
    after = ""
    if measured_.after is not None:
        was = f" (before: {measured_.before})" if measured_.before is not None else ""
        after = f" It names {measured_.after} of {measured_.count} test images of these {classes} rightly{was}."
    if old.after is not None:
        after += f" Of {classes} forgotten earlier: {old.after} of {old.count}."
    words = {
        "pass": "gone." + after,
        "fail": "not gone." + after,
        "inconclusive": "that cannot be concluded." + after,
        None: "not judged by a check." + after,
    }
    return tag("p", tag("b", "In its answers: "), words[strand.verdict])


def _features(strand: Strand, audit: dict[str, Any]) -> Html:
    count = plural(len(strand.checks), "check")
    if strand.verdict == "pass":
        compared = any(measured(c.get("reference")) for c in strand.checks)
        how = "without a never-seen model to compare with"
        if audit.get("task") == "face":  # who the model never saw stands in the figure itself
            how = f"next to people whom the model never saw{_verified(audit)}"
        elif compared:
            how = "against a model or classes that never saw them"
        text = f"gone as far as this was tested: {count} passed, {how}."
    elif strand.verdict == "fail":
        text = (
            f"not gone. {strand.count('fail')} of {count} still found the forgotten {nouns(audit)[1]} in the numbers that "
            "the model computes inside, before it answers."
        )
    elif strand.verdict == "inconclusive":
        text = f"unknown. {strand.count('inconclusive')} of {count} could not be concluded, none failed."
        first = next((c.get("says") for c in strand.checks if c.get("verdict") == "inconclusive" and c.get("says")), "")
        text += f" {first}"
    else:
        text = f"not measured by the {audit.get('tier', 'chosen')} audit of this file; see “What was not tested”."
    return tag("p", tag("b", "In its features: "), text)


def _verified(audit: dict[str, Any]) -> str:
    """How often two images of one person verify: of forgotten and of never-seen people."""
    face = (audit.get("details") or {}).get("face") or {}
    tar = [((face.get(g) or {}).get("after") or {}).get("tar") or {} for g in ("forget", "never_seen")]
    mine, theirs = (one.get("percent") for one in tar)
    if mine is None or theirs is None:
        return ""
    return f" (two images verify in {number(mine, '%')} of pairs of a forgotten person, in {number(theirs, '%')} of a stranger's)"


_RECOVERY = {
    "pass": "not easily; teaching it these classes again takes work as it would for a model that never saw them.",
    "fail": "easily; somebody who holds the model's weights brings these classes back with little work.",
    "inconclusive": "how easily that goes could not be concluded.",
}
_MEMBERSHIP = {
    "pass": "its answers do not give away which images of these classes it was trained on.",
    "fail": "its answers still give away which images of these classes it was trained on.",
    "inconclusive": "whether its answers give away which it was trained on could not be concluded.",
}


def _kept(strand: Strand, kept: Total, classes: str) -> Html:
    figures = ""
    if kept.after is not None:
        before = f"{number(kept.percent(kept.before), '%')} before, " if kept.before is not None else ""
        figures = f" Right answers on retained {classes}: {before}{number(kept.percent(kept.after), '%')} after."
    words = {
        "pass": "kept within the limits.",
        "fail": "damaged more than the limits allow.",
        "inconclusive": "cannot be concluded.",
        None: "not judged by a check.",
    }
    return tag("p", tag("b", "The rest: "), words[strand.verdict] + figures)


def _unknown(audit: dict[str, Any]) -> Html:
    missing = len(audit.get("not_tested") or [])
    tested = f"{plural(missing, 'thing was', 'things were')} not tested (listed below), and no" if missing else "no"
    return tag(
        "p",
        tag("b", "Unknown: "),
        f"{tested} test of a model proves that data was deleted. This page is evidence, weighed under the conditions "
        "it names.",
    )


def _card(strand: Strand) -> Html:
    detail = (
        f"{strand.count('pass')} of {plural(len(strand.checks), 'check')} passed" if strand.checks else "no check ran"
    )
    return tag("div", verdict(strand.verdict), tag("small", detail))

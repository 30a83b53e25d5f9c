"""Before and after, and the checks: the two tables that carry the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gsforget.report import faces
from gsforget.report.charts import bar
from gsforget.report.markup import Html, change, measured, number, plural, scroll, table, tag, verdict
from gsforget.report.verdict import nouns, strands, total

ROLES = {"forget": "Forgotten in this request", "old": "Forgotten earlier", "retain": "Retained"}
SHORT = {"forget": "forgotten now", "old": "forgotten earlier", "retain": "retained"}
FIGURES = ("Before", "95 % interval", "After", "95 % interval", "Change", "Before, after")
LONG = 40  # classes; a longer table stands at the end of the page, and its worst rows at the beginning
SHOWN = 10  # worst rows
TITLES = {
    "forget_acc": "Accuracy on forgotten classes",
    "forget_train_acc": "Accuracy on their training images",
    "old_acc": "Accuracy on classes forgotten earlier",
    "retain_drop": "Loss on retained classes",
    "class_drop": "Loss on the worst retained class",
    "neighbour_drop": "Loss on the nearest retained classes",
    "rank_of_truth": "Typical rank of the true class",
    "top5_acc": "True class among the first five",
    "nearest_class_mean": "Nearest class mean",
    "five_shot": "Nearest class mean of five images",
    "prototype_attack": "Five-shot prototype attack",
    "linear_probe": "Linear probe",
    "linear_probe_excess": "Probe excess",
    "mia_auc": "Membership inference",
    "relearn_head": "Relearning, last layer only",
    "relearn_full": "Relearning, all weights",
    "relearn_retain": "Recovery on retained data alone",
}
FURTHER = {
    "rank_of_truth": "rank",
    "top5_acc": "%",
    "nearest_class_mean": "%",
    "linear_probe": "%",
}  # in details, with units
GROUPS = (
    ("answers", "Answers"),
    ("features", "Features"),
    ("recovery", "Learning again"),
    ("membership", "Membership"),
    ("kept", "The rest"),
    ("other", "Other"),
)


def before_and_after(audit: dict[str, Any]) -> Html:
    """Roles first, then every class."""
    classes = audit.get("classes") or []
    if not classes:
        return tag("p", "Accuracies were not measured: the audit had no test images.", class_="absent")
    rows = [row for role, title in ROLES.items() if (row := _role_row(audit, role, title))]
    one, several = nouns(audit)
    columns = (
        several.capitalize(),
        "How many",
        "Test images",
        *FIGURES,
    )
    made = [table("Right answers on test images", columns, rows, numbers=range(1, 8))]
    if is_long(audit):
        lost = sorted((c for c in classes if c.get("role") == "retain" and _drop(c) > 0), key=_drop, reverse=True)
        if lost:
            made.append(
                _per_class(
                    f"Retained {several} that lost most ({min(SHOWN, len(lost))} of {len(lost)})", one, lost[:SHOWN]
                )
            )
        made.append(tag("p", tag("a", f"Every {one} ({len(classes)})", href="#every-class"), " is listed at the end."))
    else:
        made.append(tag("details", tag("summary", f"Every {one} ({len(classes)})"), every_class(audit), open=""))
    return tag("div", *made)


def is_long(audit: dict[str, Any]) -> bool:
    """Whether the table of every class is too long for the beginning of the page."""
    return len(audit.get("classes") or []) > LONG


def every_class(audit: dict[str, Any]) -> Html:
    """Every class: forgotten ones first, then retained ones, those that lost most first."""
    order = {"forget": 0, "old": 1, "retain": 2}
    ranked = sorted(
        audit.get("classes") or [], key=lambda c: (order.get(c.get("role"), 3), -_drop(c), c.get("index", 0))
    )
    one, several = nouns(audit)
    return _per_class(f"Right answers per {one}; retained {several} that lost most come first", one, ranked)


def _per_class(caption: str, noun: str, classes: Sequence[dict[str, Any]]) -> Html:
    columns = (noun.capitalize(), "Role", "Test images", *FIGURES)
    return table(caption, columns, map(_class_row, classes), range(2, 8), "each")


def _role_row(audit: dict[str, Any], role: str, title: str) -> list[object] | None:
    found = total(audit, role)
    if not found.classes:
        return None
    before, after = found.percent(found.before), found.percent(found.after)
    counted = [_wilson(right, found.count) for right in (found.before, found.after)]
    figures = [number(before, "%"), counted[0], number(after, "%"), counted[1]]
    return [title, found.classes, found.count, *figures, change(before, after), bar(before, after)]


def _wilson(right: int | None, count: int) -> str:
    from gsforget.metrics import wilson

    return _interval(*wilson(right, count)) if right is not None and count else "–"


def _class_row(entry: dict[str, Any]) -> list[object]:
    before, after = entry.get("before") or {}, entry.get("after") or {}
    count = after.get("count", before.get("count", 0))
    return [
        entry.get("name"),
        SHORT.get(entry.get("role", ""), "–"),
        count or "none",
        number(before.get("acc"), "%"),
        _interval(before.get("low"), before.get("high")),
        number(after.get("acc"), "%"),
        _interval(after.get("low"), after.get("high")),
        change(before.get("acc"), after.get("acc")),
        bar(before.get("acc"), after.get("acc")),
    ]


def _drop(entry: dict[str, Any]) -> float:
    before, after = ((entry.get(k) or {}).get("acc") for k in ("before", "after"))
    return before - after if measured(before) and measured(after) else 0.0


def _interval(low: Any, high: Any) -> str:
    return f"{low:.1f} to {high:.1f}" if measured(low) and measured(high) else "–"


def checks(audit: dict[str, Any]) -> Html:
    """Every check with its figures, threshold, verdict, and one plain sentence."""
    found = strands(audit)
    count = sum(len(s.checks) for s in found.values())
    if not count:
        return tag("p", "No check was made.", class_="absent")
    bodies = []
    titles = faces.TITLES if audit.get("task") == "face" else {}
    for name, title in GROUPS:
        if found[name].checks:
            head = tag("tr", tag("th", title, colspan=6, scope="rowgroup"), class_="group")
            rows = (row for check in found[name].checks for row in _check_rows(check, titles))
            bodies.append(tag("tbody", head, *rows))
    columns = ("Check", "This model", "Original", "Never seen", "Limit", "Verdict")
    numbers = ("This model", "Original", "Never seen", "Limit")
    head = tag(
        "thead", tag("tr", *(tag("th", c, scope="col", class_="number" if c in numbers else None) for c in columns))
    )
    caption = (
        f"{plural(count, 'check')}. “Original” is the model before forgetting; “never seen” is what a model or classes "
        "show that were never learned: the best that forgetting can reach. A figure a little beyond its limit still passes where "
        "so few images cannot tell the difference from chance (95 %)."
    )
    made = tag("table", tag("caption", caption), head, *bodies, class_="checks")
    return tag("div", scroll(made, "Checks", short=False), further(audit))


def further(audit: dict[str, Any]) -> Html | None:
    """Figures that no limit applies to; None where there are none."""
    found = audit.get("details") or {}
    rows = []
    for key, unit in FURTHER.items():
        figures = found.get(key)
        if isinstance(figures, dict) and any(map(measured, figures.values())):
            values = (figures.get("after"), figures.get("original"), figures.get("reference"))
            rows.append([title_of(key), *(number(v, unit) for v in values)])
    member = found.get("membership") or {}
    caught = [(member.get(k) or {}).get("tpr") for k in ("after", "original", "reference")]
    if any(map(measured, caught)):
        shares = (number(100 * t, "%") if measured(t) else "–" for t in caught)
        rows.append(["Training images told apart at 1 % false alarms", *shares])
    parts = []
    if rows:
        parts.append(table("Without a limit", ("Figure", "This model", "Original", "Never seen"), rows, (1, 2, 3)))
    shift, churn = found.get("prototype_shift") or {}, found.get("churn") or {}
    if shift:
        parts.append(
            tag(
                "p",
                "Likeness of the mean features to those before (cosine, 1 = the same): "
                f"forgotten {number(shift.get('forget'))}, retained {number(shift.get('retain'))}.",
            )
        )
    if churn:
        parts.append(
            tag(
                "p",
                f"On retained classes {number(churn.get('changed'), '%')} of the answers changed; "
                f"{number(churn.get('negative_flips'), '%')} were right and are now wrong.",
            )
        )
    return tag("details", tag("summary", "Further figures"), *parts, open="") if parts else None


def _check_rows(check: dict[str, Any], titles: Mapping[str, str]) -> list[Html]:
    unit = check.get("unit")
    name = str(check.get("name", ""))
    values = [number(check.get(k), unit) for k in ("value", "original", "reference")]
    limit = number(check.get("threshold"), unit)
    if limit != "–":
        limit = f"{direction(check)} {limit}"
    cells = [tag("td", v, class_="number") for v in (*values, limit)]
    first = tag(
        "tr",
        tag("th", titles.get(name) or title_of(name), scope="row"),
        *cells,
        tag("td", verdict(check.get("verdict"))),
        class_="check",
    )
    says = check.get("says")
    return [first, tag("tr", tag("td", says, colspan=6), class_="says")] if says else [first]


def direction(check: dict[str, Any]) -> str:
    """``at least`` for what should be hard (steps, ranks), ``at most`` for everything that should be small."""
    name = str(check.get("name", "")).lower()
    wanted_large = (
        check.get("unit") == "steps" or "rank" in name or ("relearn" in name and check.get("unit") == "ratio")
    )
    return "at least" if wanted_large and "retain" not in name else "at most"


def title_of(name: str) -> str:
    """A check's name for people."""
    return TITLES.get(name, name.replace("_", " ").capitalize() if name else "Unnamed check")

"""The details behind the checks, as pictures with their figures: where the model changed, features, relearning, layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gsforget.report.charts import Series, lines, scatter
from gsforget.report.markup import Html, change, join, listed, measured, moment, number, plural, scroll, table, tag

TIERS = {"quick": 0, "standard": 1, "full": 2}
MODES = {
    "head": ("Relearning the last layer", "Only the last layer is trained, on images of the forgotten classes."),
    "full": (
        "Relearning with all weights",
        "All weights are trained, on images of the forgotten classes, from the better of two starts: the last layer as it "
        "is, or with averages of these images in it.",
    ),
    "full_own_head": (
        "Relearning with all weights, last layer as it is",
        "All weights are trained, from the last layer as it is.",
    ),
    "retain": (
        "Recovery on retained data alone",
        "All weights are trained without a single image of the forgotten classes.",
    ),
}
WHO = (("subject", "this model"), ("original", "original"), ("reference", "never seen"))


def absent(audit: dict[str, Any], tier: str, what: str) -> Html:
    """Why something is not on the page: the tier that ran, or what the audit says itself."""
    ran = str(audit.get("tier", ""))
    if audit.get("kind") in ("onnx", "engine"):
        why = "the audited file gives no access to what it needs; audit the run folder for it"
    elif TIERS.get(ran, 9) < TIERS[tier]:
        why = f"the {ran} audit leaves it out; gsforget audit --tier {tier} measures it"
    else:
        why = "the audit could not measure it here; see “What was not tested”"
    return tag("p", f"{what} not measured: {why}.", class_="absent")


def requests(history: Sequence[dict[str, Any]]) -> Html:
    """One line per request, and the heat map of the blocks that each of them changed."""
    if not history:
        return tag("p", "Nothing is on record: the audited file is no run folder of gsforget.", class_="absent")
    rows = []
    for r in history:
        metrics, groups = r.get("metrics") or {}, r.get("groups") or []
        active = [str(g["name"]) for g in groups if g.get("active")]
        changed = f"{len(active)} of {len(groups)}" if groups else "–"
        figures = [number(metrics.get(k), "%") for k in ("forget_acc_after", "retain_acc_after", "old_acc_after")]
        rows.append(
            [
                r.get("sequence"),
                moment(r.get("when")),
                listed(r.get("classes") or []),
                tag("span", r.get("method") or "–", class_="whole"),
                changed,
                *figures,
            ]
        )
    columns = (
        "No.",
        "When (UTC)",
        "Classes",
        "Method",
        "Blocks changed",
        "Forgotten after",
        "Retained after",
        "Earlier ones after",
    )
    made = [table("Requests, oldest first", columns, rows, numbers=(4, 5, 6, 7))]
    made += [
        tag("p", f"Request {r.get('sequence')} came as {r['origin']['id']}.")
        for r in history
        if (r.get("origin") or {}).get("id")
    ]
    made += [tag("p", f"Request {r.get('sequence')}: {r['note']}", class_="note") for r in history if r.get("note")]
    purged = [str(r.get("sequence")) for r in history if r.get("purged")]
    if purged:
        made.append(tag("p", f"The factors that could undo request {listed(purged)} were removed with gsforget purge."))
    return tag("div", *made, heat_map(history))


def heat_map(history: Sequence[dict[str, Any]]) -> Html:
    """Norm of every block's change per request; darker is larger, a dash is a block that stayed bit for bit the same."""
    known = [r for r in history if r.get("groups")]
    if not known:
        return tag("p", "Group norms are not on record for these requests.", class_="absent")
    names = list(dict.fromkeys(str(g["name"]) for r in known for g in r["groups"]))
    by = [{str(g["name"]): g for g in r["groups"]} for r in known]
    norms = [g["norm"] for groups in by for g in groups.values() if g.get("active") and measured(g.get("norm"))]
    largest = max(norms, default=0.0) or 1.0

    def cell(group: dict[str, Any] | None) -> Html:
        if group is None:
            return tag("td", "", class_="heat")
        if not group.get("active"):
            return tag("td", tag("span", "–", title="unchanged"), class_="heat same")
        norm = group.get("norm")
        share = norm / largest if measured(norm) else 0.5
        return tag("td", _norm(norm), class_="heat", style=f"--v:{share:.3f}")

    head = tag(
        "tr", tag("th", "Block", scope="col"), *(tag("th", f"Request {r.get('sequence')}", scope="col") for r in known)
    )
    body = [
        tag("tr", tag("th", n.removesuffix(".mlp"), scope="row"), *(cell(groups.get(n)) for groups in by))
        for n in names
    ]
    caption = (
        "Size of the change (norm of its factors) per block and request. Darker is larger; a dash is a block that stayed "
        "bit for bit as it was."
    )
    made = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body), class_="heatmap")
    return scroll(made, "Heat map of changes", short=len(body) <= 26)


def _norm(norm: Any) -> str:
    if not measured(norm):
        return "changed"
    return number(norm, digits=2) if abs(norm) >= 0.005 else "< 0.01"


def feature_map(audit: dict[str, Any]) -> Html:
    """Two scatter plots: features of forgotten and retained classes before and after."""
    found = _details(audit, "feature_map") or {}
    panels = []
    for when, title in (("before", "Before forgetting"), ("after", "After forgetting")):
        points = found.get(when)
        if points and (points.get("forget") or points.get("retain")):
            forget, retain = points.get("forget") or [], points.get("retain") or []
            text = f"{plural(len(retain), 'retained image')} as circles, {plural(len(forget), 'forgotten image')} as triangles."
            groups = (("retained classes", "retain", retain), ("forgotten classes", "forget", forget))
            panels.append(tag("div", tag("h3", title), scatter(f"Feature map {when}", text, groups)))
    if not panels:
        return absent(audit, "quick", "The feature map was")
    words = (
        "Each mark is an image, placed by what the model computes inside. Each picture is flattened to the two directions in "
        "which that model's own features vary most. Forgotten classes that form islands of their own are still known to the "
        "features. Where they lie among the retained ones they may still be apart in directions that no flat picture shows: it "
        "illustrates, the checks above decide."
    )
    return tag("div", tag("p", words), tag("div", *panels, class_="panels"))


def relearning(audit: dict[str, Any]) -> Html:
    """One chart per way of relearning: this model, the original, and a model that never saw the classes."""
    found = _details(audit, "relearning") or {}
    panels = []
    for mode, (title, what) in MODES.items():
        curve = found.get(mode)
        if not curve or not curve.get("steps"):
            continue
        steps = curve["steps"]
        series = [Series(name, steps, curve.get(key) or [], key) for key, name in WHO]
        text = "; ".join(f"{s.name}: {_course(s)}" for s in series if s.points())
        chart = lines(title, text, "training steps", "forgotten classes, %", series)
        rows = [[step, *(_at(s.ys, i) for s in series)] for i, step in enumerate(steps)]
        figures = table(
            f"{title}: accuracy on forgotten classes", ("Steps", *(n for _, n in WHO)), rows, numbers=(0, 1, 2, 3)
        )
        panels.append(tag("div", tag("h3", title), tag("p", what), chart, _figures(figures)))
    if not panels:
        return absent(audit, "standard", "Relearning was")
    words = (
        "How quickly somebody with the weights could teach the classes again. A line that rises late is good. With all weights, "
        "a line ends where the classes are as good as back; the original knows them before the first step."
    )
    missing = [title for mode, (title, _) in MODES.items() if not (found.get(mode) or {}).get("steps")]
    left = [tag("p", f"Not measured: {listed(missing)}.", class_="absent")] if missing else []
    return tag("div", tag("p", words), tag("div", *panels, class_="panels"), *left)


def layers(audit: dict[str, Any]) -> Html:
    """Likeness to the original, block by block (CKA)."""
    found = _details(audit, "cka") or []
    if not found:
        return absent(audit, "standard", "Likeness per block was")
    names = [str(b.get("block")) for b in found]
    xs = [float(i) for i in range(len(found))]
    series = [
        Series("retained classes", xs, [b.get("retain") for b in found], "subject"),
        Series("forgotten classes", xs, [b.get("forget") for b in found], "reference"),
    ]
    text = "; ".join(f"{s.name}: {_course(s, 2)}" for s in series if s.points())
    short = [n.rpartition(".")[2] for n in names]
    chart = lines("Likeness to the original per block", text, "block", "CKA", series, (0.0, 1.0), short)
    rows = [[n, number(b.get("forget"), "ratio"), number(b.get("retain"), "ratio")] for n, b in zip(names, found)]
    figures = table("CKA per block", ("Block", "Forgotten", "Retained"), rows, numbers=(1, 2))
    words = (
        "1 means that a block sees images as it did before, 0 that nothing of it is left. Retained classes should stay near 1; "
        "for forgotten classes the last blocks should fall."
    )
    return tag("div", tag("p", words), unchanged(audit), chart, _figures(figures))


def unchanged(audit: dict[str, Any]) -> Html | None:
    """How much of the model is bit for bit the original's; None where that is not known."""
    found = _details(audit, "changed") or {}
    if not found.get("total"):
        return None
    blocks = [str(b).removesuffix(".mlp") for b in found.get("blocks") or []]
    return tag(
        "p",
        f"{plural(len(blocks), 'block')} of {found.get('of_blocks')} changed ({listed(blocks)}); {found.get('identical')} of "
        f"{found['total']} tensors are bit for bit those of the original.",
    )


def interpolation(audit: dict[str, Any]) -> Html:
    """Accuracy on the way from the original (0) to this model (1)."""
    found = _details(audit, "interpolation") or []
    if not found:
        return absent(audit, "standard", "The way back to the original was")
    xs = [float(p["t"]) for p in found]
    series = [
        Series("retained classes", xs, [p.get("retain") for p in found], "subject"),
        Series("forgotten classes", xs, [p.get("forget") for p in found], "reference"),
    ]
    text = "; ".join(f"{s.name}: {_course(s)}" for s in series if s.points())
    chart = lines("From the original to this model", text, "0: original … 1: this model", "right answers, %", series)
    rows = [[number(p["t"], "ratio"), number(p.get("forget"), "%"), number(p.get("retain"), "%")] for p in found]
    figures = table("Accuracy along the way", ("Share of the way", "Forgotten", "Retained"), rows, numbers=(0, 1, 2))
    words = (
        "Weights mixed from the original and this model. Where the forgotten classes are gone over a long stretch, forgetting is "
        "firm; where they come back at once, it hangs on a small change. Somebody needs the original for this."
    )
    return tag("div", tag("p", words), chart, _figures(figures))


def misattribution(audit: dict[str, Any]) -> Html:
    """Whom the model names instead, the rank of the truth, and neighbours."""
    names = {c.get("index"): c.get("name") for c in audit.get("classes") or []}

    def name(value: Any) -> object:
        return names.get(value, value)

    parts: list[Html] = []
    sinks = _details(audit, "misattribution")
    if sinks == []:
        parts.append(tag("p", "No image of a forgotten class is taken for another class with confidence."))
    elif sinks:
        rows = [
            [name(s.get("class")), number(s.get("share"), "%"), number(s.get("mean_probability"), "ratio")]
            for s in sinks
        ]
        caption = "Classes that images of forgotten classes are now taken for, with a probability above one half"
        parts.append(table(caption, ("Class", "Share of forgotten images", "Mean probability"), rows, numbers=(1, 2)))
        parts.append(
            tag("p", "For people this matters: somebody who was forgotten must not be taken for somebody else.")
        )
    else:
        parts.append(absent(audit, "quick", "Misattribution was"))
    rank = _details(audit, "rank_of_truth") or {}
    if any(measured(rank.get(k)) for k in ("original", "after")):
        parts.append(
            tag(
                "p",
                f"Typical place of the true class among all answers: {number(rank.get('original'), 'rank')} before, "
                f"{number(rank.get('after'), 'rank')} after. A truth that always comes second is hidden, not forgotten.",
            )
        )
    near = _details(audit, "neighbours") or []
    if near:
        rows = [[name(n.get("class")), f"{change(n.get('drop'), 0.0)} points"] for n in near]
        caption = "Change of the retained classes nearest to the forgotten ones"
        parts.append(table(caption, ("Class", "Right answers"), rows, numbers=(1,)))
    return join(parts)


def _details(audit: dict[str, Any], key: str) -> Any:
    return (audit.get("details") or {}).get(key)


def _figures(content: Html) -> Html:
    return tag("details", tag("summary", "Figures"), content)


def _course(series: Series, digits: int = 0) -> str:
    points = series.points()
    (x0, y0), (x1, y1) = points[0], points[-1]
    return f"{number(y0, digits=digits)} at {x0:g}, {number(y1, digits=digits)} at {x1:g}"


def _at(values: Sequence[Any], i: int) -> str:
    return number(values[i], "%") if i < len(values) else "–"

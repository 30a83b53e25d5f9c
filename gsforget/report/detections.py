"""Detectors on the page: average precision per kind, before and after, and what the top of the list hides."""

from __future__ import annotations

from typing import Any

from gsforget.report.markup import Html, number, table, tag

ROLES = (("forget", "forgotten in this request"), ("old", "forgotten earlier"), ("retain", "retained"))
WORDS = (
    "Average precision (AP) is COCO's measure of a detector: 100 % where every object is found in the right place and nothing "
    "else is. AP50 asks for half an overlap, AP for ten overlaps from 50 to 95 %. A forgotten kind should have an AP50 near "
    "0; a retained kind should keep its AP. Nothing is masked: the detector itself no longer finds the forgotten kinds."
)
EVERY = (
    "A detector gives every query a score for every kind, however low, and AP looks at the best of them only. Here all are "
    "ranked, which shows what a person with the raw outputs could still order by. Scores without any order have a few percent."
)


def average_precision(audit: dict[str, Any]) -> Html:
    """AP and AP50 of every kind, forgotten ones first."""
    rows = []
    for role, title in ROLES:
        for entry in audit.get("classes") or []:
            if entry.get("role") != role or not entry.get("objects"):
                continue
            before, after = (entry.get(when) or {} for when in ("before", "after"))
            figures = [number(side.get(key), "%") for key in ("ap", "ap50") for side in (before, after)]
            rows.append([entry["name"], title, entry["objects"], *figures])
    columns = ("Kind", "Role", "Objects", "AP, before", "after", "AP50, before", "after")
    return tag("div", table("By kind, on the test images", columns, rows, numbers=range(2, 7)), tag("p", WORDS))


def every_query(audit: dict[str, Any]) -> Html:
    """AP50 of forgotten kinds with every query ranked, and how many detections there are."""
    found = (audit.get("details") or {}).get("detection") or {}
    rows = [
        [entry["name"], number(entry.get("before"), "%"), number(entry.get("after"), "%")]
        for entry in found.get("every_query") or []
    ]
    counts = found.get("detections") or {}
    gone = counts.get("of_forgotten_kinds") or {}
    said = (
        f"Detections of forgotten kinds with a score of {number(counts.get('score_from'))} or more: "
        f"{gone.get('before')} before, {gone.get('after')} after."
    )
    listed = table("AP50 with every query ranked", ("Kind", "Before", "After"), rows, numbers=range(1, 3))
    return tag("div", listed, tag("p", EVERY), tag("p", said))

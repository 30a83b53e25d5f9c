"""Faces on the page: verification, identification and misattribution by group of people, before and after."""

from __future__ import annotations

from typing import Any

from gsforget.report.markup import Html, number, table, tag

GROUPS = (
    ("forget", "Forgotten in this request"),
    ("retain", "Retained"),
    ("old", "Forgotten earlier"),
    ("never_seen", "Never seen"),
)
TITLES = {  # of checks
    "forget_acc": "Forgotten people whom the head names",
    "old_acc": "The same, forgotten earlier",
    "misattribution": "Taken for a retained person",
    "forget_tar": "Verification above never-seen people",
    "old_tar": "The same, forgotten earlier",
    "retain_drop": "Loss of the head's answers, retained people",
    "class_drop": "The same, worst retained person",
    "retain_tar_drop": "Loss of verification, retained people",
}


def verification(audit: dict[str, Any]) -> Html:
    """Whether two images of a person still verify, next to people whom the model never saw."""
    face = (audit.get("details") or {}).get("face") or {}
    rows = []
    for group, title in GROUPS:
        before, after = ((face.get(group) or {}).get(k) or {} for k in ("before", "after"))
        tar = after.get("tar")
        if not tar:
            continue
        rows.append(
            [
                title,
                tar["count"],
                number((before.get("tar") or {}).get("percent"), "%"),
                number(tar["percent"], "%"),
                "–" if tar["low"] is None else f"{tar['low']:.1f} to {tar['high']:.1f}",
                number((before.get("rank_one") or {}).get("percent"), "%"),
                number((after.get("rank_one") or {}).get("percent"), "%"),
                number(before.get("cosine")),
                number(after.get("cosine")),
            ]
        )
    columns = (
        "People",
        "Pairs",
        "Verify, before",
        "after",
        "95 % interval",
        "Identified, before",
        "after",
        "Mean cosine, before",
        "after",
    )
    at = (face.get("threshold") or {}).get("after") or {}
    words = (
        f"Two images verify above a cosine of {number(at.get('cosine'))}, which {number(100 * at.get('far', 0), '%')} of "
        f"{at.get('impostors', 0):,} pairs of different retained people reach. A forgotten person should verify no better than a "
        "person whom the model never saw; that is not 0. Identified: half of a person's images are enrolled beside all "
        "retained people, and the others looked for."
    )
    return tag("div", table("Two images of one person", columns, rows, numbers=range(1, 9)), tag("p", words))


def mistaken(audit: dict[str, Any]) -> Html:
    """Whom people who are in no gallery are taken for."""
    found = ((audit.get("details") or {}).get("face") or {}).get("misattribution") or {}
    rows = []
    for group, title in GROUPS:
        one = (found.get(group) or {}).get("after")
        if one:
            rows.append(
                [
                    title,
                    number(one["mean"], "%"),
                    number(one["percent"], "%"),
                    f"{one['low']:.1f} to {one['high']:.1f}",
                    one["images"],
                ]
            )
    if not rows:
        return tag("p", "Not measured: no images of forgotten people.", class_="absent")
    columns = ("People", "On average", "Worst person", "95 % interval", "Images")
    caption = "Share of a person's images that are identified as one and the same retained person"
    words = "Somebody who was forgotten must not be taken for somebody else more often than a stranger is."
    return tag("div", table(caption, columns, rows, numbers=range(1, 5)), tag("p", words))


GALLERY = (
    "This page is about the model. A template of a forgotten person in a gallery, a search index or a cache identifies that "
    "person as long as it is there: gsforget forget --gallery FILE makes a gallery without it, and the old file has to be "
    "deleted. The rows of the training head, one per person, stay in the model folder, so that nothing is hidden by masking; "
    "exported files do not hold them."
)


def gallery() -> Html:
    """What deleting a person takes beside the model."""
    return tag("p", GALLERY)

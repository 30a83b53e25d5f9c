"""What `infer` and `forget` show of detectors."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsforget.cli.output import emit_json, next_command, say, table

if TYPE_CHECKING:
    from gsforget.cli.infer import Opened


def find(
    opened: Opened,
    model: Path,
    paths: list[Path],
    min_score: float,
    draw: Path | None,
    skip_corrupt: bool,
    as_json: bool,
) -> None:
    """Detect on images and show what was found; arguments as of `infer`."""
    from gsforget.export.device.detect import detect

    predictor: Any = opened.predictor
    found = detect(
        predictor,
        opened.preprocess,
        opened.forgotten,
        opened.class_names,
        paths,
        min_score,
        skip_corrupt=skip_corrupt,
        on_skip=lambda error: say(f"Left out: {error.message}"),
        draw=draw,
    )
    if as_json:
        emit_json(found)
    else:
        table(("Image", "Class", "Score", "Box"), _rows(found["images"]), numbers=("Score",))
    if draw is not None:
        say(f"Drawn on {len(found['images'])} image(s) in {draw}.")
    again = shlex.join(["gsforget", "infer", str(model), *map(str, paths[:3])])
    next_command(f"{again} --json > detections.json" if draw is not None else f"{again} --draw drawn")


def _rows(images: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    rows = []
    for image in images:
        for n, entry in enumerate(image["detections"] or [{"class": "-", "score": None, "box": []}]):
            score = "" if entry["score"] is None else f"{100 * entry['score']:.1f} %"
            box = ", ".join(f"{edge:.0f}" for edge in entry["box"])
            rows.append((image["path"] if n == 0 else "", entry["class"], score, box))
    return rows


def show_ap(metrics: dict[str, Any]) -> None:
    """AP per kind, before and after, for people."""

    def of(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    rows: list[tuple[str, ...]] = []
    for entry in metrics["classes"]:
        if entry["objects"]:
            b, a = entry["before"], entry["after"]
            figures = of(b["ap"]), of(a["ap"]), of(b["ap50"]), of(a["ap50"])
            rows.append((entry["name"], entry["role"], *figures, str(entry["objects"])))
    s = metrics["summary"]
    for title, side in (("all forgotten", "forget"), ("all retained", "retain"), ("forgotten before", "old")):
        if s[f"{side}_ap_after"] is not None:
            means = (of(s[f"{side}_{key}_{when}"]) for key in ("ap", "ap50") for when in ("before", "after"))
            rows.append((title, "", *means, ""))
    columns = ("kind", "role", "AP before", "AP after", "AP50 before", "AP50 after", "objects")
    table(columns, rows, "Average precision on the test images, nothing masked (COCO's evaluator)", columns[2:])
    counts = metrics["detection"]["detections"]
    gone = counts["of_forgotten_kinds"]
    least = counts["score_from"]
    said = f"Detections of forgotten kinds scored {least:g} or more: {gone['before']} before, {gone['after']} after."
    ranked = metrics["detection"]["every_query"]
    hidden = "; ".join(f"{v['name']} {v['before']:.1f} to {v['after']:.1f}" for v in ranked)
    say(f"{said} AP50 when every query is ranked, however low its score: {hidden}.")

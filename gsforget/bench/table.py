"""The cells of a bench as one row per method, as CSV with a line per cell, and as Markdown.

Figures over seeds are medians with the smallest and the largest; over requests the worst counts, except for H, which is
shown for each.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, NamedTuple

from gsforget.audit.probes import NO_ROOM
from gsforget.bench.store import Cell

EXCESS = "linear_probe_excess"
PROBE = ("linear_probe", "probe", True, 1)  # in place of the excess where that says nothing

# Columns beside H: key of a cell, heading, whether large is bad, digits.
COLUMNS = (
    ("forget_acc_after", "forget", True, 1),
    ("old_acc_after", "earlier", True, 1),
    ("retain_acc_after", "retain", False, 1),
    ("missing_acc_after", "missing", False, 1),
    (EXCESS, "probe excess", True, 2),
    ("prototype_attack", "prototype attack", True, 1),
    ("mia_auc", "MIA AUC", True, 2),
    ("relearn_steps", "relearn steps", False, 0),
)
OF_DETECTORS = (
    ("forget_ap_after", "forget AP", True, 1),
    ("old_ap_after", "earlier AP", True, 1),
    ("forget_ap50_after", "forget AP50", True, 1),
    ("old_ap50_after", "earlier AP50", True, 1),
    ("retain_ap_after", "retain AP", False, 1),
)


class Spread(NamedTuple):
    """Median, smallest and largest over seeds."""

    median: float
    low: float
    high: float

    def text(self, digits: int) -> str:
        if round(self.low, digits) == round(self.high, digits):
            return f"{self.median:.{digits}f}"
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        h: of each request, None where no seed got so far.
        worst: of each of `columns_of`: per seed the worst request, over seeds a spread.
        seconds: of all requests of a seed; changed: share of the parameters that a seed's requests changed at most.
        seeds: how many are whole; failed: what went wrong; checks: names of the audit's checks that failed somewhere.
        verdict: "pass", "fail", "inconclusive" (nothing to compare with), "failed" or "unfinished".
    """

    method: str
    control: str
    h: list[Spread | None]
    worst: dict[str, Spread | None]
    seconds: Spread | None
    changed: float | None
    seeds: int
    failed: list[str]
    checks: list[str]
    verdict: str
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def rows(content: dict[str, Any]) -> list[Row]:
    """Of a `bench.json`: methods by their median H at the last request, controls and what failed at the end."""
    cells: dict[str, Cell] = content["cells"]
    count = len(content["setting"]["requests"])
    names = list(dict.fromkeys(key.rsplit("/", 2)[0] for key in cells))
    columns, no_room = columns_of(content), without_room(content)
    made = [_row(name, cells, count, columns, no_room) for name in names]
    return sorted(made, key=lambda r: (bool(r.control), r.h[-1] is None, -(r.h[-1].median if r.h[-1] else 0.0)))


def columns_of(content: dict[str, Any]) -> Sequence[tuple[str, str, bool, int]]:
    """The columns of a bench, by the task of its model, and by whether a probe's excess says anything there."""
    if content["setting"].get("task") == "detect":
        return OF_DETECTORS
    nowhere = len(without_room(content)) == len(content["setting"]["requests"])
    return [PROBE if nowhere and column[0] == EXCESS else column for column in COLUMNS]


def without_room(content: dict[str, Any]) -> set[int]:
    """Requests, 0-based, in which a probe names the classes nearly as well in a model that never saw them as in the original.

    Their excess is a ratio of small differences, and the audit does not judge it either (`excess_verdict`).
    """
    found = set()
    for n in range(len(content["setting"]["requests"])):
        leaks = [content.get("references", {}).get(f"{name}/{n}", {}) for name in ("original", "never-seen")]
        original, never = (leak.get("linear_probe") for leak in leaks)
        if original is not None and never is not None and original - never < NO_ROOM:
            found.add(n)
    return found


def _row(
    name: str,
    cells: dict[str, Cell],
    count: int,
    columns: Sequence[tuple[str, str, bool, int]],
    no_room: Collection[int],
) -> Row:
    mine = {tuple(map(int, k.rsplit("/", 2)[1:])): c for k, c in cells.items() if k.rsplit("/", 2)[0] == name}
    seeds = sorted({seed for seed, _ in mine})
    good = {place: c for place, c in mine.items() if "failed" not in c}
    chains = {seed: [good[seed, n] for n in range(count) if (seed, n) in good] for seed in seeds}
    whole = [chain for chain in chains.values() if len(chain) == count]
    failed = [f"seed {seed}, request {n + 1}: {c['failed']}" for (seed, n), c in sorted(mine.items()) if "failed" in c]
    checks = sorted({check for c in good.values() for check in c["failed_checks"]})
    verdicts = {c["verdict"] for c in good.values()}
    verdict = (
        "failed"
        if failed
        else "unfinished"
        if not whole
        else next(v for v in ("fail", "inconclusive", "pass") if v in verdicts)
    )
    worst = {}
    for key, _, bad, _ in columns:
        left_out = no_room if key == EXCESS else ()
        found = [[c[key] for n, c in enumerate(chain) if c[key] is not None and n not in left_out] for chain in whole]
        worst[key] = spread([max(f) if bad else min(f) for f in found if f])
    return Row(
        name,
        next((c["control"] for c in good.values()), ""),
        [spread([good[s, n]["h_mean"] for s in seeds if (s, n) in good]) for n in range(count)],
        worst,
        spread([sum(c["seconds"] for c in chain) for chain in whole]),
        max((c["changed_parameters"] / c["parameters"] for c in good.values()), default=None),
        len(whole),
        failed,
        checks,
        verdict,
        next((c["settings"] for c in good.values()), {}),
    )


def spread(values: Sequence[float]) -> Spread | None:
    return Spread(median(values), min(values), max(values)) if values else None


def headings(content: dict[str, Any]) -> list[str]:
    steps = content["setting"]["requests"]
    used = [heading for key, heading, _, _ in _used(content)]
    return ["method", *(f"H {n + 1}" for n in range(len(steps))), *used, "seconds", "changed", "audit"]


def cells_of(row: Row, content: dict[str, Any]) -> list[str]:
    """A row as text, under `headings`."""
    h = [value.text(1) if value else "-" for value in row.h]
    figures = [value.text(digits) if (value := row.worst[key]) else "-" for key, _, _, digits in _used(content)]
    seconds = row.seconds.text(0) if row.seconds else "-"
    changed = f"{100 * row.changed:.0f} %" if row.changed is not None else "-"
    name = f"{row.method} ({row.control} control)" if row.control else row.method
    judged = f"{row.verdict} ({', '.join(row.checks)})" if row.verdict == "fail" else row.verdict
    return [name, *h, *figures, seconds, changed, judged]


def _used(content: dict[str, Any]) -> list[tuple[str, str, bool, int]]:
    """The columns in which any cell has a figure."""
    there = [c for c in content["cells"].values() if "failed" not in c]
    return [column for column in columns_of(content) if any(c[column[0]] is not None for c in there)]


def markdown(content: dict[str, Any]) -> str:
    """The table for people, with what was asked and what it was measured on."""
    setting, heads = content["setting"], headings(content)
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(cells_of(row, content)) + " |" for row in rows(content)]
    failed = [f"- {row.method}: {text}" for row in rows(content) for text in row.failed]
    budget = (
        f"at most {setting['trials']} settings tried and {setting['epochs']} passes over the retained images for each method"
        if "trials" in setting
        else "AP by a COCO evaluator, nothing masked; H on AP"
    )
    told = (
        f"Protocol {setting['protocol']}; {budget}. Medians over seeds (smallest to largest); the worst request counts, H is "
        "of each."
    )
    return "\n".join([told, "", *lines, *(["", "Failed:", *failed] if failed else [])]) + "\n"


def to_csv(content: dict[str, Any]) -> str:
    """One line per cell, all plain figures."""
    found = []
    for key, cell in content["cells"].items():
        method, seed, request = key.rsplit("/", 2)
        plain = {k: v for k, v in cell.items() if isinstance(v, (int, float, str)) or v is None}
        checks = " ".join(cell.get("failed_checks", []))
        found.append({**plain, "method": method, "seed": seed, "request": int(request) + 1, "failed_checks": checks})
    heads = list(dict.fromkeys(name for line in found for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()

"""Where an audit is written: into the run that it belongs to, never into an original model, and never by halves."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gsforget.audit.outputs import probabilities
from gsforget.errors import RequestError
from gsforget.folder import write_file
from gsforget.runs import check_writable

if TYPE_CHECKING:
    from gsforget.audit.case import Case
    from gsforget.audit.measure import Evidence

EXAMPLES = {"forget": 6, "old": 3, "retain": 6}  # images of a report that shows images


@dataclass(frozen=True)
class Places:
    """The files of an audit; None where a plain model folder was audited without --out."""

    audit: Path | None
    report: Path | None


def places(case: Case, out: Path | None) -> Places:
    """Where the files of an audit go, see `places_of`; those of an exported file carry its name.

    Raises RequestError as `places_of`.
    """
    sides = [side.path for side in (case.side, case.original, case.reference) if side]
    return places_of(case.run, sides, out, f"-{case.side.path.stem}" if case.kind in ("onnx", "engine") else "")


def places_of(run: Path | None, sides: Sequence[Path], out: Path | None, suffix: str = "") -> Places:
    """Where the files of an audit go.

    A run's audit is `RUN/audit/audit.json` and `report.html`, which the newest audit replaces; an exported file's carries
    the name of the file, `audit-model-0001-fp32.json`.

    Args:
        run: that was audited; None for what is none.
        sides: models and files that were looked at; nothing is written into a model's folder.
        out: a folder, or a file that ends in .json.

    Raises:
        RequestError: ``out_in_original``, ``bad_out``, ``out_not_writable``.
    """
    if out is not None:
        is_file = out.suffix.lower() == ".json" and not out.is_dir()
        folder = out.parent if is_file else out
        _check(run, sides, folder)
        return (
            Places(out, out.with_suffix(".html")) if is_file else Places(folder / "audit.json", folder / "report.html")
        )
    if run is None:
        return Places(None, None)
    folder = run / "audit"
    check_writable(folder)
    return Places(folder / f"audit{suffix}.json", folder / f"report{suffix}.html")


def _check(run: Path | None, sides: Sequence[Path], folder: Path) -> None:
    there = folder.resolve()
    for side in sides:
        model = side.resolve() if side.is_dir() else None
        if model is None or model not in (there, *there.parents):
            continue
        if run is not None and model == run.resolve() and (model / "audit") in (there, *there.parents):
            continue
        raise RequestError(
            f"{folder} lies in {side}, whose files never change.", "Name another folder: --out DIR.", "out_in_original"
        )
    if folder.exists() and not folder.is_dir():
        raise RequestError(
            f"{folder} is not a folder.", "Name a folder, or a file that ends in .json: --out.", "bad_out"
        )
    check_writable(folder)


def write(places: Places, document: dict[str, Any], e: Evidence, images: bool) -> None:
    """See `write_files`; with example images where they are asked for."""
    write_files(places, document, e.case.run, lambda: examples(e) if images else None)


def write_files(
    places: Places,
    document: dict[str, Any],
    run: Path | None,
    examples: Callable[[], list[Any] | None] = lambda: None,
) -> None:
    """Write the page, then the document beside it; each file is whole or not there, and neither names erased classes.

    The document's ``artifacts`` say where they are.
    """
    if places.audit is None or places.report is None:
        document["artifacts"] = {}
        return
    from gsforget.report import read_history, write_report

    places.audit.parent.mkdir(parents=True, exist_ok=True)
    document["artifacts"] = {"audit": str(places.audit), "report": str(places.report)}
    history = read_history(run) if run else []
    write_report(places.report, plain(document), history, examples())
    write_file(places.audit, json.dumps(shown(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def examples(e: Evidence) -> list[Any]:
    """A few seeded test images of each role, with the old and the new answer."""
    from gsforget.report import Example

    case, test = e.case, e.subject.test
    rows = e.sets.rows("test")
    paths = e.sets.images("test", e.subject.side.load).paths
    before, after = (probabilities(m.test) if m else None for m in (e.original, e.subject))
    assert after is not None
    shown = []
    rng = np.random.default_rng(case.ask.seed)
    for role, classes in (("forget", case.forget), ("old", case.old), ("retain", case.retained)):
        mine = rng.permutation(np.flatnonzero(np.isin(test.labels, classes)))[: EXAMPLES[role]]
        for i in np.sort(mine):
            old = int(before[i].argmax()) if before is not None else None
            new = int(after[i].argmax())
            shown.append(
                Example(
                    image=paths[rows[i]],
                    role=role,
                    before=case.names[old] if old is not None else "not known",
                    before_score=float(before[i, old]) if before is not None and old is not None else None,
                    after=case.names[new],
                    after_score=float(after[i, new]),
                )
            )
    return shown


def shown(document: dict[str, Any]) -> dict[str, Any]:
    """The document as it may leave the workstation: erased classes are called forgotten-N."""
    from gsforget.report.privacy import mask_names

    return mask_names(plain(document))


def plain(value: Any) -> Any:
    """As JSON has it: numpy scalars as numbers, NaN and infinities as null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (np.generic,)):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value

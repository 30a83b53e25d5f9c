"""`gsforget history`: what was erased from a model, when, and what it cost."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from gsforget.cli.output import emit_json, next_command, table


def history(
    run: Annotated[Path | None, typer.Argument(help="Run folder; default: the newest under runs/.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """List the erasures behind a run: date, classes, accuracies after, and the model's hash."""
    from gsforget import ledger
    from gsforget.runs import newest_run

    folder = run or newest_run()
    entries = ledger.history(folder)
    table(
        ("#", "date (UTC)", "classes", "method", "forget % after", "retain % after", "model"),
        [_row(entry) for entry in entries],
        f"Erasures behind {folder}",
        numbers=("#", "forget % after", "retain % after"),
    )
    if json:
        emit_json({"erasures": entries})
    next_command(f"gsforget verify {shlex.quote(str(folder))}")


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    after = (entry["metrics"].get(key) for key in ("forget_acc_after", "retain_acc_after"))
    forget, retain = ("" if value is None else f"{value:.1f}" for value in after)
    classes = ", ".join(c["name"] for c in entry["classes"]) or f"{entry.get('images', 0)} single image(s)"
    date = entry["time"].replace("T", " ").removesuffix("Z")
    return str(entry["sequence"]), date, classes, entry["method"], forget, retain, entry["model"][:12]

"""The requests behind a run, oldest first, from its ledger and from the run folders that are still there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gsforget import ledger
from gsforget.errors import GsforgetError
from gsforget.lineage import ancestors, read_request
from gsforget.purged import day, read_purged


def read_history(run: Path) -> list[dict[str, Any]]:
    """One entry per erasure of a run's chain, oldest first; an empty list for a folder that is no run.

    The run's own ledger tells of every erasure (when, method, hashes, the figures after it); what only a run folder
    holds (group norms, gates, what was chosen, seed, versions) is there as long as that folder is.

    Returns:
        ``{"sequence", "classes", "method", "when", "groups", "metrics", "gates", "chosen", "thresholds", "origin", "sha256",
        "data_sha256", "seed", "versions", "device", "purged", "note"}`` per erasure.  Classes are named ``forgotten-N``;
        ``origin`` is the id, date and basis of the request where it came in a file, never the requester.
        ``note`` says why a part is missing, else None; ``purged`` is the day on which factors were removed, or None.

    Raises:
        SafetyError: ``broken_ledger``.
    """
    entries = ledger.parse(ledger.read_lines(run / ledger.LEDGER), run / ledger.LEDGER)
    folders: dict[int, Path] = {len(entries): run}
    for ancestor in ancestors(run):
        if ancestor.found and ancestor.path is not None:
            folders[ancestor.sequence] = ancestor.path
    return [_request(entry, folders.get(int(entry["sequence"]))) for entry in entries]


def _request(entry: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    made = {
        "sequence": entry["sequence"],
        "classes": [f"forgotten-{c['index']}" for c in entry["classes"]],
        "method": entry["method"],
        "when": entry["time"],
        "groups": [],
        "metrics": dict(entry["metrics"]),
        "gates": [],
        "chosen": {},
        "thresholds": {},
        "origin": {},
        "sha256": {k: entry[k] for k in ("base", "model", "config", "delta", "request") if entry.get(k)},
        "data_sha256": {},
        "seed": None,
        "versions": {},
        "device": None,
        "purged": None,
        "note": None,
    }
    if folder is None:
        return {**made, "note": "Its run folder is not there any more, so only its line in the ledger is known."}
    try:
        request = read_request(folder)
        made["purged"] = next((day(e.date) for e in reversed(read_purged(folder)) if e.path.startswith("delta")), None)
    except GsforgetError as error:
        return {**made, "note": error.message}
    measured = _read(folder / "metrics.json")
    if not measured:
        made["note"] = "Its metrics.json is missing or cannot be read."
    return {
        **made,
        "groups": [
            {"name": str(g.get("name")), "active": bool(g.get("active")), "norm": g.get("norm")}
            for g in measured.get("groups", [])
        ],
        "metrics": {**made["metrics"], **measured.get("summary", {})},
        "gates": measured.get("gates", []),
        "chosen": request.get("chosen", {}),
        "thresholds": request.get("thresholds", {}),
        "origin": {k: v for k, v in (request.get("request") or {}).items() if k in ("id", "date", "basis")},
        "data_sha256": request.get("data_sha256", {}),
        "seed": request.get("settings", {}).get("seed"),
        "versions": {"gsforget": request.get("gsforget"), **request.get("versions", {})},
        "device": request.get("device"),
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

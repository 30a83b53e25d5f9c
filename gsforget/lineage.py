"""The models behind a run, newest first: the earlier runs of its chain and the original model, as far as they are there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsforget import ledger
from gsforget.errors import SafetyError
from gsforget.folder import WEIGHTS, sha256

REQUEST = "request.json"


@dataclass(frozen=True)
class Ancestor:
    """A model that an erasure of the chain started from.

    Attributes:
        sequence: erasures in it; 0 for the original model.
        path: where it lies, or, where it is not found, where it lay.  None where it never was a folder.
        sha256: of its weights, as the erasure after it noted it.
        found: whether `path` holds that very model, or the run folder that held it until its weights were purged.
        weights: whether its weights are still there.
    """

    sequence: int
    path: Path | None
    sha256: str | None
    found: bool
    weights: bool


def read_request(folder: Path) -> dict[str, Any]:
    """A run's `request.json`; empty for a folder that is no run.

    Raises SafetyError ``broken_ledger`` where it is not the JSON object that it was.
    """
    path = folder / REQUEST
    if not path.is_file():
        return {}
    try:
        request = json.loads(path.read_bytes())
    except ValueError:
        request = None
    if not isinstance(request, dict):
        raise SafetyError(f"{path} is not the JSON object that it was.", ledger.HINT, "broken_ledger")
    return request


def annotations_of(request: dict[str, Any], data: Path, given: str | None) -> str | None:
    """What `--annotations` is for images under `data`: what was `given`, else what the run noted of the same folder, while
    its files are there; else None, and they are looked for where they usually lie."""
    noted = request.get("annotations")
    if given is not None or not noted or Path(request.get("data", "")).resolve() != data.resolve():
        return given
    return str(noted) if all(Path(part).exists() for part in noted.split(",")) else None


def ancestors(run: Path) -> list[Ancestor]:
    """The models behind a run, newest first; the walk ends at the original model or at the first one that is not found.

    A folder counts only if its weights have the hash that the next run noted, or, where they were purged, if its ledger
    ends with that hash.  A run beside this one comes before one at the place that was noted: of a copied or moved chain
    the copy is meant, and a purge of it must not reach into the place that it was copied from.
    """
    found: list[Ancestor] = []
    folder: Path | None = run
    sequence: int | None = None
    while folder is not None:
        request = read_request(folder)
        number = request.get("sequence")
        if not isinstance(number, int) or number < 1 or (sequence is not None and number >= sequence):
            break
        sequence = number
        parent = _ancestor(folder, request, number - 1)
        found.append(parent)
        folder = parent.path if parent.found else None
    return found


def _ancestor(folder: Path, request: dict[str, Any], sequence: int) -> Ancestor:
    digest = request.get("parent_sha256")
    if not request.get("parent"):
        return Ancestor(sequence, None, digest, False, False)
    named = Path(request["parent"])
    for place in (folder.parent / named.name, named):
        if place.resolve() == folder.resolve():
            continue
        if (place / WEIGHTS).is_file():
            if sha256(place / WEIGHTS) == digest:
                return Ancestor(sequence, place, digest, True, True)
        elif _ledger_ends_with(place, digest):
            return Ancestor(sequence, place, digest, True, False)
    return Ancestor(sequence, named, digest, False, False)


def _ledger_ends_with(folder: Path, digest: str | None) -> bool:
    try:
        lines = ledger.read_lines(folder / ledger.LEDGER)
        return bool(lines) and json.loads(lines[-1])["model"] == digest
    except (SafetyError, ValueError, KeyError, TypeError, OSError):
        return False

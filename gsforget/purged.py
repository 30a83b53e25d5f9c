"""The note that a purge leaves in a run folder, `audit/purged.json`: what was removed, when, and what its hashes were.

Standard library only, because the ledger and the model folders read it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gsforget.errors import SafetyError

PURGED = Path("audit", "purged.json")


@dataclass(frozen=True)
class Removed:
    """One file that a purge removed or was about to remove.

    Attributes:
        path: relative to the run folder, with forward slashes.
        sha256: of what was removed; None for a link, whose target was not followed.
        bytes: its size.
        why: what it was, in a few words.
        date: UTC, ISO 8601, to the second.
    """

    path: str
    sha256: str | None
    bytes: int
    why: str
    date: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_purged(run: Path) -> list[Removed]:
    """What the purges of a run folder noted, oldest first; nothing where it was never purged.

    Raises SafetyError ``broken_ledger`` where the note cannot be read.
    """
    path = run / PURGED
    if not path.is_file():
        return []
    try:
        return [Removed(**entry) for entry in json.loads(path.read_bytes())["removed"]]
    except (ValueError, TypeError, KeyError) as error:
        raise SafetyError(
            f"{path} is not the note that gsforget purge wrote.", "Restore it from a backup.", "broken_ledger"
        ) from error


def find_purged(run: Path, name: str) -> Removed | None:
    """The latest removal of a file, by its path relative to the run folder; None while it is there, or was never noted."""
    if (run / name).exists():
        return None
    return next((entry for entry in reversed(read_purged(run)) if entry.path == name), None)


def day(date: str) -> str:
    """``2026-01-31T12:00:00Z`` as ``2026-01-31``."""
    return date.partition("T")[0]

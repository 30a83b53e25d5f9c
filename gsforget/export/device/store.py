"""The device folder: what a device holds, and whether state, ledger and files agree.

`state.json` holds the counter, `ledger.jsonl` how it came about, `models/` the artifacts, `intent.json` what was begun and
must be finished before anything loads.  Every file is replaced whole; whoever reads or changes the folder holds its lock.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gsforget.canonical import FIRST, line_sha256, read_lines
from gsforget.errors import SafetyError
from gsforget.export.device.counters import AckFolder, Acknowledge, NoCounter, RollbackCounter
from gsforget.export.device.files import PARTIAL, flush_folder, sha256, write_file, write_json
from gsforget.export.device.keys import FleetKey, read_fleet_key
from gsforget.export.device.lock import WAIT, locked
from gsforget.export.device.metadata import sidecar_path
from gsforget.export.device.records import Entry, Held, Intent, State
from gsforget.export.device.strict_json import TIME
from gsforget.export.device.trust import Trust, read_trust

STATE, LEDGER, INTENT, PENDING = "state.json", "ledger.jsonl", "intent.json", "pending.gsf"
TRUST, FLEET_KEY = "trust.json", "fleet.key"
MODELS, CACHE = "models", "cache"
REPAIR = "Install a full package, made by gsforget export --patch --full: gsforget apply FILE.gsf --device-dir DIR."


class DeviceFolder:
    """A device folder on disk.  Its methods expect that the caller holds the lock, see ``locked``."""

    def __init__(
        self, root: str | Path, counter: RollbackCounter | None = None, acknowledge: Acknowledge | None = None
    ):
        self.root = Path(root)
        self.counter: RollbackCounter = counter or NoCounter()
        self.acknowledge: Acknowledge = acknowledge or AckFolder(self.root)
        self.models = self.root / MODELS
        self.pending = self.root / PENDING
        self.ledger = self.root / LEDGER

    def locked(self, wait: float = WAIT) -> AbstractContextManager[None]:
        """Hold the folder alone, see ``lock.locked``."""
        return locked(self.root, wait)

    def trust(self) -> Trust:
        return read_trust(self.root / TRUST)

    def write_trust(self, trust: Trust) -> None:
        write_json(self.root / TRUST, trust.to_json())
        flush_folder(self.root)

    def fleet_key(self) -> FleetKey | None:
        path = self.root / FLEET_KEY
        return read_fleet_key(path) if path.is_file() else None

    def state(self) -> State | None:
        """What `state.json` says; None where it is absent.  Raises SafetyError ``broken_state``."""
        return self._read(STATE, State.from_json, "broken_state")

    def intent(self) -> Intent | None:
        """What `intent.json` says; None where it is absent.  Raises SafetyError ``broken_intent``."""
        return self._read(INTENT, Intent.from_json, "broken_intent")

    def entries(self) -> list[Entry]:
        """The ledger's lines, chained.  Raises SafetyError ``broken_ledger``."""
        path = self.ledger
        lines = read_lines(path, REPAIR)
        entries: list[Entry] = []
        previous, counter = FIRST, 0
        for number, line in enumerate(lines, 1):
            try:
                entry = Entry.parse(line)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise SafetyError(f"{path}: line {number} is malformed.", REPAIR, "broken_ledger") from error
            if entry.previous != previous or entry.sequence < counter:
                message = f"{path}: line {number} does not follow the line before it."
                raise SafetyError(message, REPAIR, "broken_ledger")
            if entries and entry.model_id != entries[0].model_id:
                raise SafetyError(f"{path}: line {number} is of another model.", REPAIR, "broken_ledger")
            previous, counter = line_sha256(line), entry.sequence
            entries.append(entry)
        return entries

    def check(self) -> State | None:
        """The state, where ledger, counters and files agree with it; None for a folder that holds nothing yet.

        The artifacts' bytes are not read; ``check_artifact`` does that.

        Raises SafetyError: ``broken_state``, ``broken_ledger``, ``rollback`` (the state lies behind its ledger, its
        hardware counter or its server), ``foreign_file`` (a file in `models/` that no line names), ``base_gone`` (an
        artifact is absent).
        """
        state, entries = self.state(), self.entries()
        if state is None:
            held = [p.name for p in self._in_models()]
            if entries or held:
                raise SafetyError(
                    f"{self.root / STATE} is gone, though the folder holds {'a ledger' if entries else held[0]}.",
                    REPAIR,
                    "broken_state",
                )
            return None
        self._check_ledger(state, entries)
        known = max(self.counter.read(state.model_id), self.acknowledge.newest(state.model_id))
        if known > state.sequence:
            raise SafetyError(
                f"{self.root} holds sequence {state.sequence}, but this device had reached {known}: it was set back.",
                REPAIR,
                "rollback",
            )
        self._check_files(state)
        return state

    def floor(self) -> int:
        """The largest sequence that anything readable here or any counter names; 0 where nothing does."""
        found, model_ids = [0], set()
        for read in (self.state, self.intent):
            try:
                record = read()
            except SafetyError:
                continue
            if record is not None:
                found.append(record.sequence)
                model_ids.add(record.model_id)
        for line in _lines(self.ledger):
            try:
                entry = Entry.parse(line)
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
            found.append(entry.sequence)
            model_ids.add(entry.model_id)
        for model_id in model_ids:
            found += [self.counter.read(model_id), self.acknowledge.newest(model_id)]
        return max(found)

    def model_id(self) -> str | None:
        """Which model the folder belongs to, by whatever can still be read; None for an empty folder."""
        for read in (self.state, self.intent):
            try:
                record = read()
            except SafetyError:
                continue
            if record is not None:
                return record.model_id
        try:
            entries = self.entries()
        except SafetyError:
            return None
        return entries[-1].model_id if entries else None

    def check_artifact(self, held: Held, whole: bool = True) -> Path:
        """The path of an artifact whose bytes, and whose sidecar's, are those of the state.

        Args:
            whole: else the artifact's own bytes are not read, since the caller hashes them.

        Raises SafetyError ``base_gone`` or ``hash_mismatch``.
        """
        path = self.models / held.name
        for part, expected in ((sidecar_path(path), held.sidecar), (path, held.sha256 if whole else None)):
            if part.is_symlink() or not part.is_file():
                raise SafetyError(f"{part} is gone, or is no plain file.", REPAIR, "base_gone")
            if expected is not None and sha256(part) != expected:
                raise SafetyError(f"{part} is not the file that this device was given.", REPAIR, "hash_mismatch")
        return path

    def cache(self, digest: str) -> Path:
        """The cache folder of the artifact with a SHA-256; no other artifact ever sees it."""
        return self.root / CACHE / digest

    def write_state(self, state: State) -> None:
        write_json(self.root / STATE, state.to_json())
        flush_folder(self.root)

    def write_intent(self, intent: Intent) -> None:
        write_json(self.root / INTENT, intent.to_json())
        flush_folder(self.root)

    def append(self, entry: Entry) -> None:
        """Add a line to the ledger, whole or not at all; a line with ``replaced`` begins a new ledger."""
        before = [] if entry.replaced else read_lines(self.ledger, REPAIR)
        write_file(self.ledger, "".join(f"{line}\n" for line in (*before, entry.line())))
        flush_folder(self.root)

    def forget_intent(self) -> None:
        """Remove the intent record; the last step of all."""
        (self.root / INTENT).unlink(missing_ok=True)
        flush_folder(self.root)

    def forget_ledger(self) -> None:
        """Remove the ledger, of an install that is taken back."""
        self.ledger.unlink(missing_ok=True)
        flush_folder(self.root)

    def clean(self, keep: tuple[Held, ...]) -> list[str]:
        """Delete all artifacts but those to keep, their sidecars and caches, and the pending package.

        Returns the names of what was deleted from `models/`, without sidecars.
        """
        kept = {n for a in keep for n in (a.name, f"{a.name}.json")}
        removed = [p for p in self._in_models() if p.name not in kept]
        # An artifact before its sidecar: a sidecar alone is nothing that could load.
        for path in sorted(removed, key=lambda p: p.suffix == ".json"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        self._remove_partial()
        digests = {a.sha256 for a in keep}
        for folder in (self.root / CACHE).glob("*"):
            if folder.name not in digests:
                shutil.rmtree(folder)
        if self.models.is_dir():
            flush_folder(self.models)
        self.pending.unlink(missing_ok=True)
        flush_folder(self.root)
        return [p.name for p in removed if p.suffix != ".json"]

    def sweep(self) -> None:
        """Remove what a call left behind that ended before its intent record: half-written files, a pending package."""
        self._remove_partial()
        self.pending.unlink(missing_ok=True)

    def _remove_partial(self) -> None:
        for folder in (self.root, self.models):
            for path in folder.glob(f".*{PARTIAL}"):
                path.unlink()

    def _read(self, name: str, parse: Any, kind: str) -> Any:
        path = self.root / name
        if not path.exists() and not path.is_symlink():
            return None
        try:
            return parse(json.loads(path.read_bytes()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SafetyError(f"{path} is damaged.", REPAIR, kind) from error

    def _in_models(self) -> list[Path]:
        if not self.models.is_dir():
            return []
        return sorted(p for p in self.models.iterdir() if not (p.name.startswith(".") and p.name.endswith(PARTIAL)))

    def _check_ledger(self, state: State, entries: list[Entry]) -> None:
        hashes = [line_sha256(e.line()) for e in entries]
        if state.ledger not in hashes:
            message = f"{self.ledger} was cut or changed: it lacks the line that {STATE} names."
            raise SafetyError(message, REPAIR, "broken_ledger")
        if state.ledger != hashes[-1]:
            message = (
                f"{self.root / STATE} was set back to sequence {state.sequence}; the ledger has reached "
                f"{entries[-1].sequence}."
            )
            raise SafetyError(message, REPAIR, "rollback")
        if entries[-1].state() != state:
            message = f"{self.root / STATE} says something else than the last line of the ledger."
            raise SafetyError(message, REPAIR, "broken_state")

    def _check_files(self, state: State) -> None:
        expected = {n for a in state.artifacts for n in (a.name, f"{a.name}.json")}
        found = {p.name for p in self._in_models()}
        if found - expected:
            raise SafetyError(
                f"{self.models / min(found - expected)} is in no line of the ledger: it was put there by hand.",
                "Remove it; models are installed by gsforget apply.",
                "foreign_file",
            )
        if expected - found:
            raise SafetyError(f"{self.models / min(expected - found)} is gone.", REPAIR, "base_gone")
        for a in state.artifacts:
            if (self.models / a.name).stat().st_size != a.bytes:
                message = f"{self.models / a.name} is not the file that this device was given."
                raise SafetyError(message, REPAIR, "hash_mismatch")


def is_device_folder(path: Path) -> bool:
    """Whether a folder holds a device's state, or what is left of one; a run folder has a ledger too, but no `models/`."""
    left = (path / LEDGER).exists() and (path / MODELS).is_dir()
    return left or any((path / name).exists() for name in (STATE, INTENT))


def now_text() -> str:
    """The time of a ledger line."""
    return datetime.now(UTC).strftime(TIME)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes; of none where it is absent."""
    return hashlib.sha256(path.read_bytes() if path.is_file() else b"").hexdigest()


def _lines(path: Path) -> list[str]:
    return path.read_bytes().decode(errors="replace").split("\n") if path.is_file() else []

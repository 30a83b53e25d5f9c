"""From the intent record on: write, check, load, answer, record, swap, clean; each step may be repeated after a kill.

Whoever opens a device folder calls ``RollForward.recover`` first, so that what was begun is finished before anything loads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from gsforget.canonical import FIRST, line_sha256
from gsforget.errors import SafetyError
from gsforget.export.device.acknowledgements import tell
from gsforget.export.device.changes import PatchedArtifact
from gsforget.export.device.edit import Edits
from gsforget.export.device.files import flush_folder, mapped, sha256, write_json, write_pieces
from gsforget.export.device.follow import Followed, make_engine
from gsforget.export.device.lock import WAIT, wait_for_answers
from gsforget.export.device.manifest import Manifest
from gsforget.export.device.metadata import read_sidecar, sidecar_path
from gsforget.export.device.onnx_file import outside_files
from gsforget.export.device.opening import Loaded, try_out
from gsforget.export.device.package import read_package, verify_signature
from gsforget.export.device.records import Entry, Held, Intent, Made, State
from gsforget.export.device.runtime import Predictor
from gsforget.export.device.store import REPAIR, DeviceFolder, file_sha256, now_text

Swap = Callable[[Predictor | None], None]


@dataclass
class Applied:
    """What a call did.

    Attributes:
        kind: ``install``, ``patch`` or ``full``.
        state: what the device holds now.
        removed: names of what was deleted from `models/`.
        loaded: the model, ready for use, and who answered.
        manifest: SHA-256 of the package's manifest; None of an install.
        seconds: of the steps.
    """

    kind: str
    state: State
    removed: list[str]
    loaded: Loaded
    manifest: str | None
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The document of `gsforget apply`."""
        shown = ("name", "kind", "sha256", "bytes")
        return {
            "kind": self.kind,
            "model_id": self.state.model_id,
            "sequence": self.state.sequence,
            "precision": self.state.precision,
            "artifacts": [
                {**{k: v for k, v in asdict(a).items() if k in shown}, "answered": a.name in self.loaded.answered}
                for a in self.state.artifacts
            ],
            "removed": self.removed,
            "seconds": {k: round(v, 4) for k, v in self.seconds.items()},
            "not_tested": self.loaded.not_tested,
            "verdict": "pass",
        }


@dataclass
class RollForward:
    """Steps 5 to 8 of a call that holds the folder's lock.

    Attributes:
        folder: the device folder.
        device: where the new model answers, as for `open_model`.
        swap: called in step 7 with the new model, loaded, or None where nothing runs here.
        waits: whether to wait in step 7 until nobody answers by the model before.  Who opens the folder in order to answer
            reports nothing, and may be one of those who are waited for.
        seconds: how long the steps took so far.
    """

    folder: DeviceFolder
    device: str = "auto"
    swap: Swap | None = None
    waits: bool = True
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def recover(self) -> Applied | None:
        """Finish what an earlier call began; None where there is nothing to finish, or an install was taken back.

        Raises SafetyError, and nothing may load, where it cannot be finished: ``cannot_finish``, or as the steps raise.
        """
        folder = self.folder
        intent = folder.intent()
        if intent is None:
            folder.sweep()
            return None
        entries = self._entries(intent)
        state = _readable_state(folder)
        if state is not None and is_done(intent, state, entries):
            asked = Loaded(not_tested=["answers of the model: they were asked before the call was interrupted"])
            return self._clean(intent, state, asked)
        if intent.kind == "install":
            self.undo(intent, entries)
            return None
        if not folder.pending.is_file():
            raise _cannot_finish(intent, "pending.gsf is gone")
        package = read_package(folder.pending)
        if package.manifest_sha256 != intent.manifest:
            raise _cannot_finish(intent, "pending.gsf is another package")
        manifest = verify_signature(package, folder.trust())
        return self.finish(intent, Edits(manifest, package.plain(folder.fleet_key())))

    def finish(self, intent: Intent, edits: Edits) -> Applied:
        """Steps 5 to 8 of a package, whose intent record is written."""
        folder, manifest = self.folder, edits.manifest
        folder.counter.advance(manifest.model_id, manifest.sequence)
        by_name = {a.name: a for a in manifest.artifacts}
        folder.models.mkdir(exist_ok=True)
        named = [made for made in intent.artifacts if made.source is None]
        held = tuple(self._make(made, by_name[made.name], edits) for made in named)
        flush_folder(folder.models)
        flush_folder(folder.root)
        self.lap("write")
        loaded = try_out(folder, held, self.device, manifest.info, manifest.known_answers)
        self.lap("answers")
        followed = [self._follow(intent, made, manifest) for made in intent.artifacts if made.source is not None]
        for one in followed:
            loaded.not_tested += [one.not_tested] if one.not_tested else []
            loaded.answered += [one.held.name] if one.held and not one.not_tested else []
        held += tuple(one.held for one in followed if one.held is not None)
        flush_folder(folder.models)
        if followed:
            self.lap("engines")
        return self.record(intent, manifest.precision, held, manifest.key_id, loaded)

    def record(
        self, intent: Intent, precision: str, held: tuple[Held, ...], key_id: str | None, loaded: Loaded
    ) -> Applied:
        """Steps 6 to 8: ledger, state and counter, swap, clean."""
        folder = self.folder
        entries = self._entries(intent)
        entry = entries[-1] if entries and _is_of(entries[-1], intent) else None
        if entry is None:
            to, whole = (intent.model_id, intent.sequence), (intent.ledger, intent.replaced)
            entry = Entry(*to, intent.kind, precision, held, intent.manifest, key_id, now_text(), *whole)
            folder.append(entry)
        folder.write_state(entry.state())
        return self._clean(intent, entry.state(), loaded)

    def undo(self, intent: Intent, entries: list[Entry]) -> None:
        """Take back an install into an empty folder; there was nothing that could be fallen back to."""
        if [e.kind for e in entries] not in ([], ["install"]):
            raise _cannot_finish(intent, "the folder was not empty when it began")
        self.folder.clean(())
        self.folder.forget_ledger()
        self.folder.forget_intent()

    def lap(self, step: str) -> None:
        """Note how long a step took."""
        now = time.perf_counter()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self.started
        self.started = now

    def _clean(self, intent: Intent, state: State, loaded: Loaded) -> Applied:
        """Steps 7 and 8, after which the intent is forgotten."""
        folder = self.folder
        folder.counter.advance(state.model_id, state.sequence)
        if self.swap is not None:
            self.swap(loaded.predictor)
        if self.waits and not wait_for_answers(folder.root):
            loaded.not_tested.append(f"whether all answer by the new model: a batch has not ended within {WAIT:.0f} s")
        removed = folder.clean(state.artifacts)
        try:
            tell(folder, state)
        except Exception as error:  # a server that cannot be reached stops no erasure
            loaded.not_tested.append(f"acknowledgement: {error}")
        folder.forget_intent()
        self.lap("finish")
        return Applied(intent.kind, state, removed, loaded, intent.manifest, dict(self.seconds))

    def _entries(self, intent: Intent) -> list[Entry]:
        """The ledger, checked against an intent: it ends with the line before it, or with its own line.

        Of a repair that begins the ledger anew, the old lines are not looked at.
        """
        folder = self.folder
        if intent.replaced is not None and file_sha256(folder.ledger) == intent.replaced:
            return []
        entries = folder.entries()
        end = line_sha256(entries[-1].line()) if entries else FIRST
        if (end == intent.ledger and intent.replaced is None) or (entries and _is_of(entries[-1], intent)):
            return entries
        message = f"{folder.ledger} does not end where what was begun on this device says that it does."
        raise SafetyError(message, REPAIR, "broken_ledger")

    def _follow(self, intent: Intent, made: Made, manifest: Manifest) -> Followed:
        """An engine that follows its ONNX file; the one that an earlier call has recorded already, where one has."""
        folder = self.folder
        entries = self._entries(intent)
        if entries and _is_of(entries[-1], intent):
            recorded = next((held for held in entries[-1].artifacts if held.name == made.name), None)
            if recorded is not None:
                folder.check_artifact(recorded)
            return Followed(recorded, "recorded", f"{made.name}: it was settled before the call was interrupted")
        onnx = next(one for one in intent.artifacts if one.name == made.source)
        base = next((held for held in entries[-1].artifacts if held.name == made.base), None) if entries else None
        return make_engine(folder, made, base, onnx.base, manifest)

    def _make(self, made: Made, artifact: PatchedArtifact, edits: Edits) -> Held:
        """Write one new artifact and its sidecar, unless it is there whole, and read it back."""
        path = self.folder.models / made.name
        if path.is_symlink() or not path.is_file() or sha256(path) != artifact.after.sha256:
            old = open_base(self.folder, made)
            edits.prepare(old, artifact)
            write_pieces(path, edits.pieces(old, artifact))
            if sha256(path) != artifact.after.sha256:
                raise SafetyError(
                    f"{path} was not written as it should be: is the disk damaged?", REPAIR, "wrong_result"
                )
        m = edits.manifest
        outside = sorted(outside_files(path)) if artifact.kind == "onnx" else []
        beside = {a.name: a.after.sha256 for a in m.artifacts if a.kind == "data"}
        if not set(outside) <= beside.keys():
            message = (
                f"{path} keeps weights in a file that does not come with it: {min(set(outside) - beside.keys())!r}."
            )
            raise SafetyError(message, REPAIR, "bad_location")
        write_json(
            sidecar_path(path),
            {
                "format": 1,
                "kind": artifact.kind,
                "file": artifact.name,
                **artifact.after.to_json(),
                "precision": m.precision,
                "targets": list(artifact.targets),
                "builder": artifact.builder.to_json() if artifact.builder else None,
                "model": m.info.to_json(),
                **({"data_files": {name: beside[name] for name in outside}} if outside else {}),
                **self._carried(made, artifact),
            },
        )
        after = artifact.after
        return Held(made.name, artifact.kind, after.sha256, after.bytes, sha256(sidecar_path(path)))

    def _carried(self, made: Made, artifact: PatchedArtifact) -> dict[str, Any]:
        """What the sidecar of the ONNX file before says and a package does not: which weights erasures change.

        An engine that is built from the new file can then be refitted as well.
        """
        if artifact.kind != "onnx" or made.base is None:
            return {}
        try:
            before = read_sidecar(self.folder.models / made.base) or {}
        except SafetyError:  # damaged since it was checked; no erasure waits for it
            return {}
        return {"erasable": before["erasable"]} if "erasable" in before else {}


def open_base(folder: DeviceFolder, made: Made) -> memoryview:
    """The bytes that an artifact is made from; none where it comes whole.  Raises SafetyError ``base_gone``."""
    if made.base is None:
        return memoryview(b"")
    try:
        return mapped(folder.models / made.base)
    except OSError as error:
        message = f"{folder.models / made.base}, from which {made.name} is made, is gone."
        raise SafetyError(message, REPAIR, "base_gone") from error


def is_done(intent: Intent, state: State, entries: list[Entry]) -> bool:
    """Whether all that an intent asks for is recorded, so that only cleaning is left and the new model may load."""
    return bool(entries) and _is_of(entries[-1], intent) and entries[-1].state() == state


def _is_of(entry: Entry, intent: Intent) -> bool:
    """Whether a ledger line is the one that an intent leads to."""
    keys = ("kind", "model_id", "sequence", "manifest", "replaced")
    same = all(getattr(entry, k) == getattr(intent, k) for k in keys) and entry.previous == intent.ledger
    found = {a.name for a in entry.artifacts}
    needed = {made.name for made in intent.artifacts if made.source is None}  # an engine that follows may be destroyed
    return same and needed <= found <= {made.name for made in intent.artifacts}


def _readable_state(folder: DeviceFolder) -> State | None:
    """The state, or None where it is absent or damaged: what was begun does not need it and writes it anew."""
    try:
        return folder.state()
    except SafetyError:
        return None


def _cannot_finish(intent: Intent, why: str) -> SafetyError:
    what = "An install" if intent.kind == "install" else f"A package of sequence {intent.sequence}"
    return SafetyError(f"{what} was begun on this device and cannot be finished: {why}.", REPAIR, "cannot_finish")

"""Apply what arrives on a device: install, patch, repair; and open what is installed, rolling forward first.

Up to the intent record nothing has changed, and a refusal leaves everything as it was.  From the intent record on, the old
model never loads; see `rollforward`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from gsforget.canonical import FIRST, line_sha256
from gsforget.errors import GsforgetError, RequestError, SafetyError
from gsforget.export.device.changes import PatchedArtifact
from gsforget.export.device.counters import Acknowledge, RollbackCounter
from gsforget.export.device.edit import Edits
from gsforget.export.device.exports import read_exports, sidecar_bytes
from gsforget.export.device.files import copy_file, flush_folder, read_json, write_file
from gsforget.export.device.follow import next_name, source_of
from gsforget.export.device.keys import read_public_key
from gsforget.export.device.lock import WAIT
from gsforget.export.device.manifest import Manifest
from gsforget.export.device.metadata import sidecar_path
from gsforget.export.device.opening import load, try_out
from gsforget.export.device.package import Package, read_package, verify
from gsforget.export.device.records import Held, Intent, Made, State
from gsforget.export.device.rollforward import Applied, RollForward, Swap, is_done, open_base
from gsforget.export.device.runtime import SUFFIXES, Predictor, check_artifact
from gsforget.export.device.store import REPAIR, DeviceFolder, file_sha256
from gsforget.export.device.trust import ROTATION, Trust, read_rotation

SLACK = 2**20  # bytes that stay free beside what is written


def apply(
    file: str | Path | Sequence[str | Path],
    root: str | Path,
    *,
    trust: str | Path | None = None,
    now: datetime | None = None,
    device: str = "auto",
    counter: RollbackCounter | None = None,
    acknowledge: Acknowledge | None = None,
    swap: Swap | None = None,
    wait: float = WAIT,
) -> Applied:
    """Apply a package to a device folder, or install exported artifacts into an empty one.

    Args:
        file: a package (`.gsf`), or one or several artifacts of one export (`.onnx`, `.engine`) with their sidecars
            beside them.
        root: the device folder; made where it is absent and something can be installed.
        trust: a public signing key to trust from now on, for a device that trusts none.
        now: UTC, for expiry; default: this machine's clock.
        device: where the new model answers its known tests, as for `open_model`.
        counter, acknowledge: a hardware counter, and a server that remembers.
        swap: called with the new model, loaded (None where nothing runs here), once it is the only one that may load
            and before the old files are deleted.  The lock is held; `open_device` in another thread or process gets the
            new model meanwhile.
        wait: seconds to wait for another process.

    Raises:
        RequestError: nothing to apply, ``not_empty``, ``empty_device``, ``sequence_gap`` (a patch that comes too early).
        SafetyError: a package that must not be applied (see `package.verify`; ``wrong_model``, ``rollback``,
            ``wrong_base``, ``wrong_result``), a folder that does not fit itself (see `DeviceFolder.check`), a new model
            that does not answer as it must (``known_answers``).
        GsforgetError: ``no_space``, before anything was written.
    """
    paths = [Path(file)] if isinstance(file, (str, Path)) else [Path(f) for f in file]
    installs = bool(paths) and all(p.suffix.lower() in SUFFIXES for p in paths)
    if not installs and len(paths) != 1:
        raise RequestError(
            "A package is applied alone, and artifacts of one export are installed together.",
            "Name one .gsf file, or .onnx and .engine files.",
            "bad_files",
        )
    call = _Call(DeviceFolder(root, counter, acknowledge), device, swap)
    key = read_public_key(Path(trust)) if trust is not None else None
    exports = [check_artifact(p) for p in paths] if installs else []
    package = None if installs else read_package(paths[0])
    if package is not None and package.manifest.kind == "patch" and not call.folder.root.is_dir():
        raise empty_device(call.folder.root)
    call.folder.root.mkdir(parents=True, exist_ok=True)
    with call.folder.locked(wait):
        trusted = call.folder.trust().add(key) if key else call.folder.trust()
        return call.install(exports, trusted) if package is None else call.package(package, trusted, now)


def open_device(
    root: str | Path,
    device: str = "auto",
    counter: RollbackCounter | None = None,
    acknowledge: Acknowledge | None = None,
    wait: float = WAIT,
) -> Predictor:
    """Load the newest artifact of a device folder that can run here, after finishing what was begun.

    Where another process has only to clean up after the new model, that model is loaded without waiting for it.

    Raises:
        RequestError: ``empty_device``, ``locked``, ``cannot_run``.
        SafetyError: the folder does not fit itself, or what was begun cannot be finished: nothing loads.
    """
    folder = DeviceFolder(root, counter, acknowledge)
    if not folder.root.is_dir():
        raise empty_device(folder.root)
    until = time.monotonic() + wait
    while True:
        try:
            with folder.locked(0):
                RollForward(folder, device, waits=False).recover()
                state = folder.check()
                if state is None:
                    raise empty_device(folder.root)
                return load(folder, state, device)
        except RequestError as error:
            if error.kind != "locked" or time.monotonic() >= until:
                raise
        predictor = _load_beside(folder, device)
        if predictor is not None:
            return predictor
        time.sleep(0.02)


def trust_key(file: str | Path, root: str | Path, wait: float = WAIT) -> Trust:
    """Let a device trust its first signing key, or follow a rotation; what was begun is finished first.

    Args:
        file: `signing.pub.json` or `rotation.json`.
        root: the device folder; made where it is absent.

    Raises RequestError for a file that is neither, SafetyError ``other_trust`` or ``bad_rotation``.
    """
    folder = DeviceFolder(root)
    raw = read_json(Path(file))
    rotation = read_rotation(Path(file)) if raw.get("kind") == ROTATION else None
    key = None if rotation else read_public_key(Path(file))
    folder.root.mkdir(parents=True, exist_ok=True)
    with folder.locked(wait):
        RollForward(folder).recover()
        before = folder.trust()
        trusted = before.rotated(rotation) if rotation else before.add(key) if key else before
        if trusted != before:
            folder.write_trust(trusted)
    return trusted


def _load_beside(folder: DeviceFolder, device: str) -> Predictor | None:
    """The new model while the holder of the lock has only to clean up; None where that is not so."""
    try:
        intent, state = folder.intent(), folder.state()
        if intent is None or state is None or not is_done(intent, state, folder.entries()):
            return None
        predictor = load(folder, state, device)
        # Another package may have been begun meanwhile; then this model is an old one.
        return predictor if folder.intent() in (intent, None) and folder.state() == state else None
    except (SafetyError, OSError):
        return None  # seen between two steps of the other process; with the lock, it is judged again


class _Call(RollForward):
    """One call of ``apply``, which holds the lock."""

    def package(self, package: Package, trust: Trust, now: datetime | None) -> Applied:
        """Steps 1 to 4 of a package, then the rest."""
        stuck = False
        try:
            finished = self.recover()
            if finished is not None and finished.manifest == package.manifest_sha256:
                return finished  # the same call again, after a kill
        except SafetyError:
            stuck = True
            if package.manifest.kind != "full":
                raise
        manifest = verify(package, trust, now)
        state = self._current(manifest, stuck)
        self._check_sequence(package, manifest, state)
        artifacts, made = self._plan(package, manifest, state)
        old = {held.name: held.bytes for held in state.artifacts} if state is not None else {}
        engines = sum(old[str(one.base)] for one in made if one.source is not None)
        self._check_space(sum(a.after.bytes for a in artifacts) + engines + package.path.stat().st_size)
        edits = Edits(manifest, package.plain(self.folder.fleet_key()))
        for artifact, one in zip(artifacts, made):  # engines that follow come last
            edits.prepare(open_base(self.folder, one), artifact)
        self.lap("check")
        intent = self._intend(package, made)
        self._keep(package, trust)
        self.folder.write_intent(intent)
        return self.finish(intent, edits)

    def install(self, exports: list[Path], trust: Trust) -> Applied:
        """Install artifacts of one export into an empty folder."""
        folder = self.folder
        finished = self.recover()
        if finished is not None and finished.kind == "install":
            return finished  # the same call again, after a kill
        if folder.check() is not None:
            hint = "Apply a signed package to it, or name an empty folder."
            raise RequestError(f"{folder.root} holds a model already.", hint, "not_empty")
        files, held, info = read_exports(exports)
        floor = max(folder.counter.read(info.model_id), folder.acknowledge.newest(info.model_id))
        if info.sequence < floor:
            raise _rollback(exports[0], info.sequence, floor)
        self._check_space(sum(a.bytes for a in held))
        self.lap("check")
        if trust != folder.trust():
            folder.write_trust(trust)
        folder.models.mkdir(exist_ok=True)
        made = tuple(Made(a.name, None) for a in held)
        intent = Intent("install", info.model_id, info.sequence, None, FIRST, None, made)
        folder.write_intent(intent)
        try:
            for path, one in zip(files, held, strict=True):
                copy_file(path, folder.models / one.name)
                write_file(sidecar_path(folder.models / one.name), sidecar_bytes(path, one))
                folder.check_artifact(one)
            flush_folder(folder.models)
            self.lap("write")
            loaded = try_out(folder, held, self.device, info, None)
        except Exception:
            self.undo(intent, [])
            raise
        self.lap("answers")
        return self.record(intent, info.precision, held, None, loaded)

    def _current(self, manifest: Manifest, stuck: bool) -> State | None:
        """The state that a package meets; None where the folder is empty, or where only a full package helps."""
        if stuck:
            return None
        try:
            state = self.folder.check()
            named = {a.before.sha256 for a in manifest.artifacts if a.before is not None}
            for held in state.artifacts if state is not None else ():
                self.folder.check_artifact(held, whole=held.sha256 not in named)  # else `Edits.prepare` reads it all
        except SafetyError:
            if manifest.kind != "full":
                raise
            return None
        return state

    def _check_sequence(self, package: Package, manifest: Manifest, state: State | None) -> None:
        folder = self.folder
        belongs = folder.model_id()
        if belongs not in (None, manifest.model_id):
            raise SafetyError(
                f"{package.path} is for model {manifest.model_id}, and this device holds model {belongs}.",
                "Apply it to another device folder.",
                "wrong_model",
            )
        reached = (folder.counter.read(manifest.model_id), folder.acknowledge.newest(manifest.model_id))
        floor = max(folder.floor(), *reached)
        if manifest.kind == "full":
            if manifest.sequence < floor or (manifest.sequence == floor and state is not None):
                raise _rollback(package.path, manifest.sequence, floor)
            return
        if state is None:
            raise empty_device(folder.root)
        if manifest.sequence <= floor:
            raise _rollback(package.path, manifest.sequence, floor)
        if manifest.requires != state.sequence:
            raise RequestError(
                f"{package.path} needs sequence {manifest.requires}, and this device is at {state.sequence}.",
                f"Apply patch {state.sequence + 1} first, or a full package.",
                "sequence_gap",
            )

    def _plan(
        self, package: Package, manifest: Manifest, state: State | None
    ) -> tuple[list[PatchedArtifact], list[Made]]:
        """What is made from what: by a patch, exactly one new artifact from each of the device's own.

        Engines of standard TensorRT, which no package names, are made from their ONNX files; they come last.
        """
        in_use = {held.name.casefold() for held in state.artifacts} if state is not None else set()
        taken = in_use | {artifact.name.casefold() for artifact in manifest.artifacts}

        def follow(engine: Held, source: Held, new: str) -> Made:
            name = next_name(engine.name, source.name, new, taken)
            taken.add(name.casefold())
            return Made(name, engine.name, new)

        if manifest.kind == "full" or state is None:
            artifacts, made = list(manifest.artifacts), [Made(a.name, None) for a in manifest.artifacts]
            whole = next((a for a in artifacts if a.kind == "onnx"), None)
            known = state.artifacts if state is not None else ()
            for held in known:
                source = source_of(self.folder, held, known)
                if source is not None and whole is not None:
                    made.append(follow(held, source, whole.name))
        else:
            by_base = {(a.kind, a.before.sha256): a for a in manifest.artifacts if a.before is not None}
            artifacts, made, following = [], [], []
            for held in state.artifacts:
                artifact = by_base.get((held.kind, held.sha256)) if manifest.precision == state.precision else None
                if artifact is not None:
                    artifacts.append(artifact)
                    made.append(Made(artifact.name, held.name))
                    continue
                source = source_of(self.folder, held, state.artifacts)
                new = by_base.get(("onnx", source.sha256)) if source is not None else None
                if source is None or new is None:
                    message = f"{package.path} does not know {held.name} of this device (SHA-256 {held.sha256[:12]}…)."
                    raise SafetyError(message, REPAIR, "wrong_base")
                following.append(follow(held, source, new.name))
            made += following
        new_names = [m.name.casefold() for m in made]
        clash = [m.name for m in made if m.name.casefold() in in_use or new_names.count(m.name.casefold()) > 1]
        if clash:
            raise SafetyError(
                f"{package.path} would overwrite {clash[0]}, which is in use.",
                "Ask for a package whose artifacts carry their sequence in their names.",
                "name_in_use",
            )
        return artifacts, made

    def _intend(self, package: Package, made: list[Made]) -> Intent:
        m, folder = package.manifest, self.folder
        try:
            entries = folder.entries()
            ledger, replaced = line_sha256(entries[-1].line()) if entries else FIRST, None
        except SafetyError:  # a repair, which begins the ledger anew and notes what was there
            ledger, replaced = FIRST, file_sha256(folder.ledger)
        return Intent(m.kind, m.model_id, m.sequence, package.manifest_sha256, ledger, replaced, tuple(made))

    def _keep(self, package: Package, trust: Trust) -> None:
        """Put the package where every start-up finds it, and read it back; new trust goes before it."""
        folder = self.folder
        if trust != folder.trust():
            folder.write_trust(trust)
        copy_file(package.path, folder.pending)
        flush_folder(folder.root)
        kept = read_package(folder.pending)
        if kept.manifest_sha256 != package.manifest_sha256 or kept.signature != package.signature:
            raise SafetyError(f"{package.path} was changed while it was read.", "Apply it again.", "bad_package")
        kept.stored()

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder.root).free
        if free < needed + SLACK:
            raise GsforgetError(
                f"{self.folder.root} has {free / 1e6:.0f} MB free, and {(needed + SLACK) / 1e6:.0f} MB are needed.",
                "Free some space; nothing has been changed.",
                "no_space",
            )


def empty_device(root: Path) -> RequestError:
    """What a folder without a model is refused with."""
    return RequestError(
        f"{root} holds no model.",
        f"Install one first: gsforget apply MODEL.onnx --device-dir {root} --trust signing.pub.json",
        "empty_device",
    )


def _rollback(path: Path, sequence: int, reached: int) -> SafetyError:
    return SafetyError(
        f"{path} has sequence {sequence}, and this device has reached {reached}: "
        + ("it has been applied already." if sequence == reached else "it would bring back what was erased."),
        "Ask for the newest package.",
        "rollback",
    )

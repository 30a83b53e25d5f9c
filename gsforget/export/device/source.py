"""Where a server's model comes from: a device folder, whose model changes when a package is applied, or one file."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from gsforget.errors import GsforgetError, RequestError, SafetyError
from gsforget.export.device.answering import SERVED
from gsforget.export.device.apply import open_device
from gsforget.export.device.lock import answering
from gsforget.export.device.runtime import Predictor, open_model
from gsforget.export.device.slot import Slot
from gsforget.export.device.store import INTENT, STATE, DeviceFolder, is_device_folder

Mark = tuple[tuple[int, int, int] | None, ...]


class Source:
    """A device folder or an exported file, and the device that runs it (as for `open_model`).

    Raises RequestError (kind ``no_model``) for a folder that is no device folder, as ``load`` does for other faults.
    """

    def __init__(self, path: str | Path, device: str = "auto"):
        self.path, self.device = Path(path), device
        self.is_folder = is_device_folder(self.path)
        if self.path.is_dir() and not self.is_folder:
            raise RequestError(
                f"{self.path} is not a device folder.",
                f"Install a model in one: gsforget apply MODEL.onnx --device-dir {self.path}; or name an .onnx file.",
                "no_model",
            )
        self._seen: Mark = ()

    def load(self) -> Predictor:
        """The newest model, after finishing what was begun.  Raises as ``open_device`` and ``open_model`` do."""
        before, self._seen = self._seen, self._mark()
        try:
            found = open_device(self.path, self.device) if self.is_folder else open_model(self.path, self.device)
        except RequestError as error:
            if error.kind == "locked":  # what another process does there was not seen
                self._seen = before
            raise
        if found.info.task not in SERVED:
            raise RequestError(
                f"{self.path} is a model of the task {found.info.task}, and servers answer for classifiers and detectors.",
                f"Type gsforget infer {self.path} IMAGE.",
                "not_served",
            )
        return found

    def answering(self) -> AbstractContextManager[None]:
        """Within it, look with ``follow``, answer and write down: no package is reported as applied meanwhile."""
        return answering(self.path) if self.is_folder else nullcontext()

    @property
    def changed(self) -> bool:
        """Whether a package was begun or applied since the model was loaded."""
        return self.is_folder and self._mark() != self._seen

    def follow(self, slot: Slot) -> bool:
        """Where another process has changed the device folder, put the new model into a slot; returns whether it did.

        A folder that no longer fits itself closes the slot: nothing answers until a full package repairs it.
        """
        mark = self._mark()
        if not self.is_folder or mark == self._seen:
            return False
        if self._holds(slot):
            self._seen = mark
            return False
        try:
            predictor = self.load()
        except SafetyError as error:
            slot.close(error)
            return True
        try:
            slot.swap(predictor)
        except SafetyError:  # meanwhile another thread has put a newer one in place
            return False
        return True

    def _holds(self, slot: Slot) -> bool:
        """Whether the model in place is the folder's, with nothing left to finish."""
        try:
            state, current = DeviceFolder(self.path).state(), slot.current
        except GsforgetError:
            return False
        done = state is not None and not (self.path / INTENT).exists()
        return done and state is not None and current.sha256 in {held.sha256 for held in state.artifacts}

    def _mark(self) -> Mark:
        """Changes whenever a package is begun or applied; costs two calls of the system."""
        marks: list[tuple[int, int, int] | None] = []
        for name in (STATE, INTENT):
            try:
                status = (self.path / name).stat()
            except OSError:
                marks.append(None)
                continue
            marks.append((status.st_ino, status.st_mtime_ns, status.st_size))
        return tuple(marks)

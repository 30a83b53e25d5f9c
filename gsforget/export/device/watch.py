"""`gsforget infer MODEL --watch FOLDER`: each image that arrives in a folder is answered once, a line per image.

Lines go to `FOLDER/predictions.jsonl`: ``{"path", "bytes", "modified", "top": [{"class", "score"}], "model_id",
"sequence"}``; of a detector ``detections`` (see `detect`) in place of ``top``, and ``error`` for a file that is no image.  The
file is also the memory: after a restart, what it names is not answered again, and an image that was replaced by another is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gsforget.errors import RequestError
from gsforget.export.device.answering import Wish, answer
from gsforget.export.device.detect import MIN_SCORE
from gsforget.export.device.infer import SUFFIXES
from gsforget.export.device.preprocess import size_of
from gsforget.export.device.slot import Slot
from gsforget.export.device.source import Source

PREDICTIONS = "predictions.jsonl"
BEGIN = b'{"path": '  # of every line
EVERY = 0.5  # seconds between two looks at the folder


@dataclass(frozen=True)
class Seen:
    """An image file as it was at one look: path below the folder, length, time of change in nanoseconds."""

    path: str
    bytes: int
    modified: int


class Watcher:
    """Answers the images of a folder.

    Args:
        source: where the model comes from; a device folder's is replaced between two batches when a package was applied, and
            `apply` reports that only after the batch in flight has ended.
        folder: searched with all in it; hidden files and folders are left out, so that an upload may begin as one.
        top: how many classes per image, at most; min_score: of detectors, the lowest score, 0 to 1.
        batch_size: images in one run of the model.

    Raises RequestError for a folder that is absent, cannot be written to, or whose `predictions.jsonl` is not ours; and as
    ``Source.load`` does.
    """

    def __init__(
        self,
        source: Source,
        folder: str | Path,
        top: int = 5,
        batch_size: int = 8,
        min_score: float = MIN_SCORE,
    ):
        self.source, self.folder, self.batch_size = source, Path(folder), batch_size
        self.wish = Wish(top, min_score)
        self.predictions = self.folder / PREDICTIONS
        if not self.folder.is_dir():
            raise RequestError(f"There is no folder {folder}.", "Make it, or name another one.", "no_folder")
        if not os.access(self.folder, os.W_OK):
            raise RequestError(f"{folder} may not be written to.", "Change its permissions.", "no_folder")
        self._answered = set(_read(self.predictions))
        self._before: dict[str, Seen] = {}
        self.slot = Slot(source.load())

    def look(self) -> list[dict[str, Any]]:
        """Look once, and answer what is complete and new: files that have not changed since the look before.

        Nothing is answered while another process holds the device folder; the next look goes on.

        Returns the lines that were added.  Raises SafetyError where the device folder no longer fits itself.
        """
        now = {seen.path: seen for seen in self._find()}
        settled = [s for s in now.values() if s not in self._answered and self._before.get(s.path) == s]
        self._before = now
        lines: list[dict[str, Any]] = []
        try:
            if not settled:
                with self.source.answering():
                    self.source.follow(self.slot)  # also where nothing arrives, the old model does not stay loaded
            for start in range(0, len(settled), self.batch_size):
                lines += self._answer(settled[start : start + self.batch_size])
        except RequestError as error:
            if error.kind != "locked":  # an engine that is built again takes minutes
                raise
        return lines

    @property
    def waiting(self) -> int:
        """How many files of the last look are not answered yet, since they may still be written to."""
        return sum(seen not in self._answered for seen in self._before.values())

    def _answer(self, batch: list[Seen]) -> list[dict[str, Any]]:
        """Answer a batch and keep its lines on disk, all by the model that the device folder holds then."""
        with self.source.answering():
            self.source.follow(self.slot)
            lines = self._lines(batch)
            while self.source.changed:  # what a package has overtaken is not written down
                self.source.follow(self.slot)
                lines = self._lines(batch)
            self._append(lines)
        answered = {line["path"] for line in lines}
        self._answered.update(seen for seen in batch if seen.path in answered)
        return lines

    def _lines(self, batch: list[Seen]) -> list[dict[str, Any]]:
        """The lines of a batch, by the model in place."""
        with self.slot.take() as lease:
            info = lease.predictor.info
            images, errors = self._load(batch, info.preprocess.load)
            said: dict[str, dict[str, Any]] = {}
            if images:
                pixels, names = np.stack([i for i, _ in images.values()]), [str(self.folder / path) for path in images]
                given = answer(lease.predictor, pixels, names, [size for _, size in images.values()], self.wish)
                said = dict(zip(images, given, strict=True))
        lines = []
        for seen in batch:
            if seen.path in said or seen.path in errors:
                what = said[seen.path] if seen.path in said else errors[seen.path].to_json()
                of = {"model_id": info.model_id, "sequence": info.sequence}
                lines.append({"path": seen.path, "bytes": seen.bytes, "modified": seen.modified, **what, **of})
        return lines

    def _load(
        self, batch: list[Seen], load: Callable[[Path], np.ndarray]
    ) -> tuple[dict[str, tuple[np.ndarray, tuple[int, int]]], dict[str, RequestError]]:
        """Images [C, H, W] with the sizes of their files, and faults by path; a file that is gone by now has neither."""
        images: dict[str, tuple[np.ndarray, tuple[int, int]]] = {}
        errors: dict[str, RequestError] = {}
        for seen in batch:
            try:
                images[seen.path] = load(self.folder / seen.path), size_of(self.folder / seen.path)
            except FileNotFoundError:
                continue
            except RequestError as error:
                if (self.folder / seen.path).exists():
                    errors[seen.path] = error
        return images, errors

    def _append(self, lines: list[dict[str, Any]]) -> None:
        if lines:
            with open(self.predictions, "ab") as handle:
                handle.write("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines).encode())
                handle.flush()
                os.fsync(handle.fileno())

    def _find(self) -> Iterator[Seen]:
        for where, folders, files in os.walk(self.folder):
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            for name in sorted(files):
                if name.startswith(".") or not name.lower().endswith(SUFFIXES):
                    continue
                path = Path(where, name)
                try:
                    status = path.stat()
                except OSError:  # moved away meanwhile
                    continue
                yield Seen(str(path.relative_to(self.folder)), status.st_size, status.st_mtime_ns)


def watch(watcher: Watcher, on_lines: Callable[[list[dict[str, Any]]], None], wait: Callable[[float], object]) -> None:
    """Look at the folder until ``wait`` raises, such as `time.sleep` does on Ctrl-C.

    Args:
        on_lines: told the lines of each look that added some.
        wait: called with the seconds until the next look.
    """
    while True:
        lines = watcher.look()
        if lines:
            on_lines(lines)
        wait(EVERY)


def _read(predictions: Path) -> list[Seen]:
    """What earlier calls answered.  A last line that a kill cut off is removed; its image is answered again.

    Raises RequestError ``bad_predictions`` for a file that holds other lines.
    """
    raw = predictions.read_bytes() if predictions.is_file() else b""
    *lines, cut_off = raw.split(b"\n")
    if not cut_off.startswith(BEGIN[: len(cut_off)]):
        raise _not_ours(predictions, len(lines) + 1)
    seen = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            seen.append(Seen(str(entry["path"]), int(entry["bytes"]), int(entry["modified"])))
        except (ValueError, KeyError, TypeError) as error:
            raise _not_ours(predictions, number) from error
    if cut_off:
        os.truncate(predictions, len(raw) - len(cut_off))
    return seen


def _not_ours(predictions: Path, line: int) -> RequestError:
    return RequestError(
        f"{predictions}: line {line} is none that gsforget wrote.",
        "Move the file away; its images are answered again then.",
        "bad_predictions",
    )

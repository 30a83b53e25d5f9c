"""A new artifact from an old one: the edits of a package, each tensor and both whole files checked by their hashes.

The old file is only read, and the new one is made piece by piece, so that it can be hashed and written without a copy in
memory; the new tensors alone are kept.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from gsforget.errors import SafetyError
from gsforget.export.device.changes import GiveEdit, PatchedArtifact, TensorChange, TensorEdit
from gsforget.export.device.factors import STORED, Factors
from gsforget.export.device.manifest import Manifest
from gsforget.export.device.store import REPAIR

WORKERS = min(4, os.cpu_count() or 1)


@dataclass
class Edits:
    """The edits of one package, and the new tensors that they share.

    Attributes:
        manifest: of the package, verified.
        payload: its plain bytes.
        tensors: new tensors by name, as stored, [rows, columns], as soon as they are computed.
        prepared: names of the artifacts that were prepared.
    """

    manifest: Manifest
    payload: bytes
    tensors: dict[str, Future[np.ndarray]] = field(default_factory=dict)
    prepared: set[str] = field(default_factory=set)

    def prepare(self, old: memoryview, artifact: PatchedArtifact) -> None:
        """Check an old file, compute its new tensors and check the new file's hash, once; nothing is written.

        Raises SafetyError: ``wrong_base`` where the old file or a tensor in it is another one, ``wrong_result`` where a
        new tensor or the new file does not have the hash that was signed, ``inexact_delta`` and ``out_of_range`` for
        factors that no build gives.
        """
        if artifact.name in self.prepared:
            return
        if artifact.before is None:
            self.check_result(old, artifact)
            return
        other = _wrong_base(f"The old file is not the one that {artifact.name} is made from")
        if len(old) != artifact.before.bytes:
            raise other
        changes = {t.name: t for t in self.manifest.tensors}
        failure = None
        with ThreadPoolExecutor(WORKERS) as pool:
            whole = pool.submit(lambda: hashlib.sha256(old).hexdigest())
            rest = pool.submit(rest_sha256, old, artifact.edits)
            for edit in artifact.edits:
                if isinstance(edit, TensorEdit) and edit.tensor not in self.tensors:
                    self.tensors[edit.tensor] = pool.submit(self._tensor, old, edit, changes[edit.tensor])
            try:
                self.check_result(old, artifact)  # from first to last, while the tensors are computed
            except SafetyError as error:
                failure = error
        if whole.result() != artifact.before.sha256:
            raise other
        if rest.result() != artifact.rest_sha256:
            raise _wrong_base(f"What {artifact.name} keeps of the old file is not what was signed")
        if failure is not None:
            raise failure
        self.prepared.add(artifact.name)

    def pieces(self, old: memoryview, artifact: PatchedArtifact) -> Iterator[memoryview]:
        """The new file's bytes, from first to last; after ``prepare``."""
        if artifact.before is None:  # the files of a full package lie in its payload one after the other
            start = sum(a.after.bytes for a in self.manifest.artifacts[: self.manifest.artifacts.index(artifact)])
            yield memoryview(self.payload)[start : start + artifact.after.bytes]
            return
        position = 0
        for edit in artifact.edits:
            yield old[position : edit.at]
            if isinstance(edit, GiveEdit):
                start, size = edit.give
                yield memoryview(self.payload)[start : start + size]
            else:
                new = self.tensors[edit.tensor].result()
                yield _bytes(new.T if edit.transposed else new)
            position = edit.at + edit.take
        yield old[position:]

    def check_result(self, old: memoryview, artifact: PatchedArtifact) -> None:
        """Raise SafetyError ``wrong_result`` unless the new file's hash is the one that was signed."""
        digest, length = hashlib.sha256(), 0
        for piece in self.pieces(old, artifact):
            digest.update(piece)
            length += len(piece)
        if (digest.hexdigest(), length) != (artifact.after.sha256, artifact.after.bytes):
            raise _wrong_result(artifact.name)

    def _tensor(self, old: memoryview, edit: TensorEdit, change: TensorChange) -> np.ndarray:
        rows, columns = change.shape
        raw = np.frombuffer(old, STORED[change.dtype], rows * columns, edit.at)
        weight = raw.reshape(columns, rows).T if edit.transposed else raw.reshape(rows, columns)
        if hashlib.sha256(_bytes(weight)).hexdigest() != change.before:
            raise _wrong_base(f"Tensor {change.name} of the old file is not the one that the package changes")
        new = self._factors(change).apply(weight, change.dtype, self._scales(change))
        if hashlib.sha256(_bytes(new)).hexdigest() != change.after:
            raise _wrong_result(f"tensor {change.name}")
        return new

    def _factors(self, change: TensorChange) -> Factors:
        (rows, columns), rank = change.shape, change.rank
        a, b, ea, eb = change.at
        return Factors(
            np.frombuffer(self.payload, "<i2", rank * columns, a).reshape(rank, columns),
            np.frombuffer(self.payload, "<i2", rows * rank, b).reshape(rows, rank),
            np.frombuffer(self.payload, "<i4", rank, ea),
            np.frombuffer(self.payload, "<i4", rank, eb),
        )

    def _scales(self, change: TensorChange) -> tuple[np.ndarray, np.ndarray] | None:
        if change.scale is None:
            return None
        axis = change.scale.axis
        count = 1 if axis is None else change.shape[axis]
        before, after = (
            np.frombuffer(self.payload, "<f4", count, at) for at in (change.scale.before, change.scale.after)
        )
        if not all((np.isfinite(s) & (s > 0)).all() for s in (before, after)):
            raise _wrong_result(f"the scale of tensor {change.name}")
        return (before[:, None], after[:, None]) if axis == 0 else (before[None, :], after[None, :])


def rest_sha256(old: memoryview | bytes, edits: tuple[TensorEdit | GiveEdit, ...]) -> str:
    """SHA-256 of an old file without the edited ranges."""
    digest, position = hashlib.sha256(), 0
    for edit in edits:
        digest.update(old[position : edit.at])
        position = edit.at + edit.take
    digest.update(old[position:])
    return digest.hexdigest()


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).data.cast("B")


def _wrong_base(what: str) -> SafetyError:
    return SafetyError(f"{what}.", REPAIR, "wrong_base")


def _wrong_result(what: str) -> SafetyError:
    return SafetyError(
        f"The result is not the one that was signed ({what}); nothing of it is used.",
        "Ask for the package again where it was built, or for a full package.",
        "wrong_result",
    )

"""Where a tensor's bytes lie in a file: in ONNX read off the protobuf, in an engine found by value and only if just once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gsforget.export.device.metadata import check_outside
from gsforget.export.device.onnx_file import KEY, PROPERTIES, Stored, TensorBytes, fields, read_tensors

PROBE = 64  # bytes searched for before a whole tensor is compared
MOST_HITS = 1000  # places where a probe matches; beyond, a tensor is as good as constant and is not looked for


@dataclass(frozen=True)
class Place:
    """``size`` bytes from ``at`` on; ``transposed`` where a matrix lies there column by column.

    ``file`` names the file beside an ONNX file in which they lie; None: the file itself.
    """

    at: int
    size: int
    transposed: bool = False
    file: str | None = None


class NotLocated(Exception):
    """A tensor or an entry is not where it can be found without doubt; the message says which and why."""


class OnnxBytes(TensorBytes):
    """As its base, of a file to patch: what it holds in places of its own cannot be located."""

    data: bytes

    @classmethod
    def read(cls, path: Path) -> OnnxBytes:
        """Raises NotLocated as ``onnx_tensors``, SafetyError ``bad_location`` for weights in other places than beside it."""
        check_outside(path, None)
        with _located():
            return cls.of(path.read_bytes(), path)

    def bytes(self, name: str) -> memoryview:
        """The bytes of a tensor.  Raises NotLocated where they reach beyond their file."""
        try:
            return super().bytes(name)
        except ValueError as error:
            raise NotLocated(f"tensor {error}") from error


def onnx_tensors(data: bytes) -> dict[str, Stored]:
    """Where each initializer of an ONNX file lies, in it or beside it, by name.

    Initializers stored number by number are left out.  Raises NotLocated for a file that is no ONNX model with one graph,
    or holds a name twice.
    """
    with _located():
        return read_tensors(data)


@contextmanager
def _located() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise NotLocated(f"the ONNX file cannot be read: {error}") from error


def onnx_places(data: bytes) -> dict[str, Place]:
    """As ``onnx_tensors``, of those that lie in the file itself."""
    return {name: Place(t.at, t.size) for name, t in onnx_tensors(data).items() if t.file is None}


def onnx_metadata(data: bytes, key: str) -> Place:
    """The whole entry of a metadata key in the bytes of an ONNX file, with its tag and length.

    Raises NotLocated unless it is there exactly once.
    """
    found, begin = [], 0
    for number, (start, end) in _fields(data, (0, len(data))):
        if number == PROPERTIES:
            parts = dict(_fields(data, (start, end)))
            if data[slice(*parts.get(KEY, (0, 0)))] == key.encode():
                found.append(Place(begin, end - begin))
        begin = end  # fields follow each other without a gap
    if len(found) != 1:
        raise NotLocated(f"the ONNX file holds {len(found)} metadata entries {key!r}")
    return found[0]


def find_matrix(data: bytes, matrix: np.ndarray) -> Place:
    """Where a matrix [rows, columns] lies in an engine, row by row or column by column.

    Raises NotLocated where it lies nowhere, or in more than one place.
    """
    for transposed in (False, True):
        wanted = (matrix.T if transposed else matrix).tobytes()
        at = find_all(data, wanted)
        if len(at) == 1:
            return Place(at[0], len(wanted), transposed)
        if at:
            raise NotLocated(f"it lies there {len(at)} times")
        if matrix.ndim != 2 or 1 in matrix.shape:
            break
    raise NotLocated("its bytes are not there")


def find_all(data: bytes, wanted: bytes) -> list[int]:
    """Every offset at which ``wanted`` lies in ``data``.  Raises NotLocated where it is too uniform to be told apart."""
    if not wanted:
        raise NotLocated("it is empty")
    middle = max(0, len(wanted) // 2 - PROBE // 2)
    probe = wanted[middle : middle + PROBE]
    view, found, hits = memoryview(data), [], 0
    at = data.find(probe, middle)
    while at >= 0:
        hits += 1
        if hits > MOST_HITS:
            raise NotLocated("its values are too uniform")
        begin = at - middle
        if view[begin : begin + len(wanted)] == wanted:
            found.append(begin)
        at = data.find(probe, at + 1)
    return found


def _fields(data: bytes, within: tuple[int, int]) -> Iterator[tuple[int, tuple[int, int]]]:
    try:
        yield from fields(data, *within)
    except ValueError as error:
        raise NotLocated(f"the ONNX file cannot be read: {error}") from error

"""An ONNX file read from its bytes: its properties and where its weights lie, without a package and without loading them.

An ONNX file is one protobuf message; its properties are the repeated field 14, each a message of key (1) and value (2).
See the encoding on protobuf.dev and `ModelProto` in `onnx.proto`.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from gsforget.errors import RequestError
from gsforget.export.device.files import mapped

# Field numbers of onnx.proto.
PROPERTIES, GRAPH = 14, 7  # of ModelProto
INITIALIZER = 5  # of GraphProto
NAME, RAW_DATA, EXTERNAL_DATA = 8, 9, 13  # of TensorProto
KEY, VALUE = 1, 2  # of StringStringEntryProto
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
NUMBER = 0  # in place of the number of a field that holds a number: nothing here is one

Data = mmap.mmap | bytes | memoryview
Span = tuple[int, int]


@dataclass(frozen=True)
class Stored:
    """Where the bytes of an initializer lie: ``size`` bytes from ``at`` on.

    Attributes:
        file: the file beside the ONNX file in which they lie; None for the ONNX file itself.
        named: where in the ONNX file the name of that file stands.
    """

    at: int
    size: int
    file: str | None = None
    named: Span = (0, 0)


@dataclass(frozen=True)
class TensorBytes:
    """The bytes of an ONNX file, where its tensors lie, and the files beside it that hold some of them, by name."""

    data: bytes | memoryview
    tensors: dict[str, Stored]
    beside: dict[str, memoryview]

    @classmethod
    def of(cls, data: bytes | memoryview, path: Path) -> Self:
        """Of the bytes of the file at a path.  Raises ValueError as `read_tensors`, OSError for a file that is not beside it."""
        tensors = read_tensors(data)
        files = {t.file for t in tensors.values() if t.file is not None}
        return cls(data, tensors, {name: mapped(path.with_name(name)) for name in sorted(files)})

    def bytes(self, name: str) -> memoryview:
        """The bytes of a tensor.  Raises ValueError where they reach beyond their file."""
        place = self.tensors[name]
        source = memoryview(self.data) if place.file is None else self.beside[place.file]
        found = source[place.at : place.at + place.size]
        if len(found) != place.size:
            raise ValueError(f"{name} reaches beyond the file in which it lies")
        return found


def read_properties(path: Path) -> dict[str, str]:
    """The `metadata_props` of an ONNX file.  Raises RequestError (kind ``bad_artifact``) for a file that is none."""
    try:
        with open(path, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            pairs = [dict(fields(data, *span)) for number, span in fields(data, 0, len(data)) if number == PROPERTIES]
            return {_text(data, p[KEY]): _text(data, p.get(VALUE, (0, 0))) for p in pairs if KEY in p}
    except ValueError as error:  # an empty file cannot be mapped; text that is not UTF-8
        raise RequestError(
            f"{path} is not an ONNX file ({error}).", "Copy the file again, or export it again.", "bad_artifact"
        ) from error


def read_tensors(data: Data) -> dict[str, Stored]:
    """Where the bytes of each initializer lie, by name.

    Left out are initializers that are stored number by number, and such in another file whose length is not said there.
    Raises ValueError for data that is no ONNX model with one graph, or holds a name twice.
    """
    graphs = [span for number, span in fields(data, 0, len(data)) if number == GRAPH]
    if len(graphs) != 1:
        raise ValueError(f"it holds {len(graphs)} graphs and is no ONNX model that gsforget wrote")
    found: dict[str, Stored] = {}
    seen: set[str] = set()
    for tensor in (span for number, span in fields(data, *graphs[0]) if number == INITIALIZER):
        parts = list(fields(data, *tensor))
        by_number = dict(parts)
        name = _text(data, by_number.get(NAME, (0, 0)))
        if not name or name in seen:
            raise ValueError(f"it holds an initializer {name!r} twice or without a name")
        seen.add(name)
        outside = [span for number, span in parts if number == EXTERNAL_DATA]
        if outside:
            found.update(_outside(data, name, outside))
        elif RAW_DATA in by_number:
            start, end = by_number[RAW_DATA]
            found[name] = Stored(start, end - start)
    return found


def outside_files(path: Path) -> set[str]:
    """The names of all files in which an ONNX file keeps weights: of initializers, and of tensors anywhere in its nodes.

    Raises RequestError (kind ``bad_artifact``) for a file that is none.
    """
    try:
        with open(path, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return set(_locations(data, (0, len(data)), MODEL))
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"{path} is not an ONNX file ({error}).", "Copy the file again, or export it again.", "bad_artifact"
        ) from error


# Where messages lie in messages, by field number: a tensor can be anywhere below these.
MODEL = "model"
INSIDE = {
    MODEL: {GRAPH: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", INITIALIZER: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}


def _locations(data: Data, within: Span, kind: str) -> Iterator[str]:
    if kind == "tensor":
        for number, span in fields(data, *within):
            if number == EXTERNAL_DATA:
                entry = dict(fields(data, *span))
                if _text(data, entry.get(KEY, (0, 0))) == "location":
                    yield _text(data, entry.get(VALUE, (0, 0)))
        return
    for number, span in fields(data, *within):
        if number in INSIDE[kind]:
            yield from _locations(data, span, INSIDE[kind][number])


def _outside(data: Data, name: str, entries: list[Span]) -> dict[str, Stored]:
    """Where bytes lie in another file, by the entries of a tensor's external data."""
    pairs = [dict(fields(data, *entry)) for entry in entries]
    known = {_text(data, p[KEY]): p.get(VALUE, (0, 0)) for p in pairs if KEY in p}
    if not {"location", "length"} <= known.keys():
        return {}
    at, size = int(_text(data, known.get("offset", (0, 0))) or 0), int(_text(data, known["length"]))
    if at < 0 or size < 0:
        raise ValueError(f"the bytes of {name} lie before their file begins")
    return {name: Stored(at, size, _text(data, known["location"]), known["location"])}


def _text(data: Data, span: Span) -> str:
    return bytes(data[slice(*span)]).decode()


def fields(data: Data, at: int, end: int) -> Iterator[tuple[int, Span]]:
    """Field numbers of a message, and where in the data the value of each lies.

    All that is read here is bytes.  A field that is stored as a number has the number ``NUMBER``, whatever it says itself: where
    bytes are expected, a reader of protobuf passes over it, and must not see another value than we do.

    Raises ValueError for no message, and for tags beyond 32 bits, which readers cut off.
    """
    while at < end:
        key, at = _varint(data, at, end)
        kind = key & 7
        if key >= 2**32:
            raise ValueError(f"the field before byte {at} has a number that is none")
        if kind == BYTES:
            size, at = _varint(data, at, end)
        elif kind == VARINT:
            size = _varint(data, at, end)[1] - at
        elif kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
        else:
            raise ValueError(f"byte {at} starts no field")
        if at + size > end:
            raise ValueError("it is cut off")
        yield key >> 3 if kind == BYTES else NUMBER, (at, at + size)
        at += size


def _varint(data: Data, at: int, end: int) -> tuple[int, int]:
    """A number of seven bits per byte, lowest first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise ValueError("it is cut off")
        byte = data[at]
        value, at = value | (byte & 0x7F) << shift, at + 1
        if byte < 0x80:
            return value, at
    raise ValueError("a number in it has no end")

"""The properties of an ONNX file, read from its bytes: no package for it, and no loading of its weights.

An ONNX file is one protobuf message; its properties are the repeated field 14, each a message of key (1) and value (2).
See the encoding on protobuf.dev and `ModelProto` in `onnx.proto`.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from gsforget.errors import RequestError

PROPERTIES = 14
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types


def read_properties(path: Path) -> dict[str, str]:
    """The `metadata_props` of an ONNX file.  Raises RequestError (kind ``bad_artifact``) for a file that is none."""
    try:
        with open(path, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            pairs = [dict(fields(data, *span)) for number, span in fields(data, 0, len(data)) if number == PROPERTIES]
            return {data[slice(*p[1])].decode(): data[slice(*p[2])].decode() if 2 in p else "" for p in pairs if 1 in p}
    except ValueError as error:  # an empty file cannot be mapped; text that is not UTF-8
        raise RequestError(
            f"{path} is not an ONNX file ({error}).", "Copy the file again, or export it again.", "bad_artifact"
        ) from error


def fields(data: mmap.mmap | bytes, at: int, end: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """Field numbers of a message, and where in the data the value of each lies.  Raises ValueError for no message."""
    while at < end:
        key, at = _varint(data, at, end)
        kind = key & 7
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
        yield key >> 3, (at, at + size)
        at += size


def _varint(data: mmap.mmap | bytes, at: int, end: int) -> tuple[int, int]:
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

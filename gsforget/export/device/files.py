"""Files that are complete or absent, and their hashes, for a room that may not import the core."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from gsforget.errors import RequestError

PARTIAL = ".partial"  # ends the name of a file that is being written; a dot begins it
CHUNK = 2**22  # bytes that are copied at a time


def write_file(path: Path, data: bytes | memoryview | str) -> None:
    """Write and flush to disk under a temporary name, then rename: the file is complete or absent."""
    write_pieces(path, [data.encode() if isinstance(data, str) else data])


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """As ``write_file``, for a file that is made piece by piece."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with open(partial, "wb") as handle:
            for piece in pieces:
                handle.write(piece)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def copy_file(source: Path, path: Path) -> None:
    """As ``write_file``, with the bytes of another file."""
    with open(source, "rb") as handle:
        write_pieces(path, _chunks(handle))


def _chunks(handle: BinaryIO) -> Iterator[bytes]:
    while chunk := handle.read(CHUNK):
        yield chunk


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def flush_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut; does nothing on Windows."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_folder(path: Path, option: str = "--out") -> None:
    """Raise RequestError ``bad_out`` where something that is no folder has the name of one that ``option`` gave."""
    if path.exists() and not path.is_dir():
        raise RequestError(f"{path} is not a folder.", f"Name a folder: {option} DIR.", "bad_out")

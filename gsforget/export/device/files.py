"""Files that are complete or absent, and their hashes, for a room that may not import the core."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from gsforget.errors import RequestError

PARTIAL = ".partial"  # ends the name of a file that is being written; a dot begins it
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # devices, on Windows
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


def mapped(path: Path) -> memoryview:
    """A file's bytes, read from the disk where they are looked at.  Raises OSError where it cannot be opened."""
    with open(path, "rb") as handle:
        empty = os.fstat(handle.fileno()).st_size == 0
        return memoryview(b"" if empty else mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.  Raises RequestError ``bad_file`` for an absent file and for anything else."""
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror}).", "Check the path.", "bad_file") from error
    except ValueError as error:
        raise RequestError(f"{path} is not JSON ({error}).", "Name another file.", "bad_file") from error
    if not isinstance(raw, dict):
        raise RequestError(f"{path} does not hold a JSON object.", "Name another file.", "bad_file")
    return raw


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object for people and programs, complete or not at all."""
    write_file(path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def flush_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut; does nothing on Windows."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_plain_name(name: str) -> bool:
    """Whether a text can only be the name of a file inside the folder where it is put, on any system."""
    if not 1 <= len(name.encode(errors="replace")) <= 200 or name != name.strip() or name.endswith("."):
        return False
    plain = all(c.isprintable() and c not in '/\\:*?"<>|' for c in name)
    return plain and not name.startswith(".") and not RESERVED.fullmatch(name)


def check_folder(path: Path, option: str = "--out") -> None:
    """Raise RequestError ``bad_out`` where something that is no folder has the name of one that ``option`` gave."""
    if path.exists() and not path.is_dir():
        raise RequestError(f"{path} is not a folder.", f"Name a folder: {option} DIR.", "bad_out")

"""One process at a time reads or changes a device folder."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gsforget.errors import RequestError

LOCK = "lock"
WAIT = 60.0  # seconds that one process waits for another


@contextmanager
def locked(root: Path, wait: float = WAIT) -> Iterator[None]:
    """Hold a device folder alone.  Raises RequestError ``locked`` where another process keeps it for ``wait`` seconds."""
    with open(root / LOCK, "a+b") as handle:
        until = time.monotonic() + wait
        while not _try_lock(handle.fileno()):
            if time.monotonic() >= until:
                raise RequestError(f"{root} is in use by another gsforget.", "Wait until it has finished.", "locked")
            time.sleep(0.02)
        try:
            yield
        finally:
            _unlock(handle.fileno())


def _try_lock(descriptor: int) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _unlock(descriptor: int) -> None:
    if os.name == "nt":
        import msvcrt

        os.lseek(descriptor, 0, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_UN)

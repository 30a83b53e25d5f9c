"""One process at a time reads or changes a device folder; and who answers by its model is waited for before a swap is done."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gsforget.errors import RequestError

LOCK = "lock"
ANSWERING = "answering.lock"
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


@contextmanager
def answering(root: Path) -> Iterator[None]:
    """Answer by a device folder's model: look which one it is, answer and write down, all within.

    Many may do so at once.  Whoever has put a new model in place waits for them, see ``wait_for_answers``; it outlives no
    process.
    """
    with open(root / ANSWERING, "a+b") as handle:
        while not _try_lock(handle.fileno(), shared=True):
            time.sleep(0.005)
        try:
            yield
        finally:
            _unlock(handle.fileno())


def wait_for_answers(root: Path, wait: float = WAIT) -> bool:
    """Wait until everybody has finished who began to answer before this call; False where somebody has not.

    Whoever begins later sees what the folder holds now.
    """
    if not (root / ANSWERING).exists():  # nobody has begun to answer from here
        return True
    with open(root / ANSWERING, "r+b") as handle:
        until = time.monotonic() + wait
        while not _try_lock(handle.fileno()):
            if time.monotonic() >= until:
                return False
            time.sleep(0.005)
        _unlock(handle.fileno())
    return True


def _try_lock(descriptor: int, shared: bool = False) -> bool:
    """Lock a file at once, or not.  Windows has no shared locks: there, one answers after the other."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
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

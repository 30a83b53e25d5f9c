"""One process at a time reads or changes a device folder; and who answers by its model is waited for before a swap is done."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gsforget.errors import RequestError

LOCK = "lock"
ANSWERING, TURN = "answering.lock", "answering.turn"
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
    with open(root / ANSWERING, "a+b") as handle, open(root / TURN, "a+b") as turn:
        with _held(turn.fileno(), shared=True):  # nobody overtakes a call that waits
            _lock(handle.fileno(), shared=True)
        try:
            yield
        finally:
            _unlock(handle.fileno())


def wait_for_answers(root: Path, wait: float = WAIT) -> bool:
    """Wait until everybody has finished who began to answer before this call; False where somebody has not.

    Whoever begins later waits for this call, and sees what the folder holds now.
    """
    if not (root / ANSWERING).exists():  # nobody has begun to answer from here
        return True
    until = time.monotonic() + wait
    with open(root / ANSWERING, "a+b") as handle, open(root / TURN, "a+b") as turn:
        try:
            with _held(turn.fileno(), until=until), _held(handle.fileno(), until=until):
                return True
        except TimeoutError:
            return False


@contextmanager
def _held(descriptor: int, shared: bool = False, until: float = math.inf) -> Iterator[None]:
    _lock(descriptor, shared, until)
    try:
        yield
    finally:
        _unlock(descriptor)


def _lock(descriptor: int, shared: bool = False, until: float = math.inf) -> None:
    """Raises TimeoutError."""
    while not _try_lock(descriptor, shared):
        if time.monotonic() >= until:
            raise TimeoutError
        time.sleep(0.005)


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

"""The model in use, replaced while requests run: those in flight finish on the old one, and the swap waits for them."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

from gsforget.errors import GsforgetError, SafetyError
from gsforget.export.device.runtime import Predictor

DRAIN = 60.0  # seconds that a swap waits for requests in flight


class Lease:
    """One use of a model: the model stays the one that answers until the lease is released; releasing twice is no harm."""

    def __init__(self, slot: Slot, holder: _Holder):
        self._slot, self._holder, self._released = slot, holder, False

    @property
    def predictor(self) -> Predictor:
        return self._holder.predictor

    def again(self) -> Lease:
        """A second lease of the same model, though another one may be in place by now."""
        return self._slot._lease(self._holder)

    def release(self) -> None:
        self._slot._release(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass(eq=False)
class _Holder:
    predictor: Predictor
    users: int = field(default=0)


class Slot:
    """Holds the model that answers.  All methods may be called from any thread."""

    def __init__(self, predictor: Predictor):
        self._holder = _Holder(predictor)
        self._closed: GsforgetError | None = None
        self._changed = threading.Condition()

    @property
    def current(self) -> Predictor:
        """The model in place.  Raises what ``close`` was given."""
        with self._changed:
            self._check_open()
            return self._holder.predictor

    @property
    def closed(self) -> GsforgetError | None:
        """Why no model answers; None where one does."""
        with self._changed:
            return self._closed

    def take(self) -> Lease:
        """Use the model in place until the lease is released.  Raises what ``close`` was given."""
        with self._changed:
            self._check_open()
            return self._lease(self._holder)

    def swap(self, predictor: Predictor, wait: float = DRAIN) -> bool:
        """Put a model in place; it answers from now on, also where the slot was closed.

        Returns:
            Whether all uses of the model before have ended; False where some have not after ``wait`` seconds.

        Raises:
            SafetyError: kind ``rollback``: the model in place has more erasures.
        """
        with self._changed:
            old, new = self._holder.predictor.info, predictor.info
            if new.model_id == old.model_id and new.sequence < old.sequence:
                raise SafetyError(
                    f"A model of sequence {new.sequence} cannot take the place of one of sequence {old.sequence}.",
                    "Load the newest model.",
                    "rollback",
                )
            return self._replace(_Holder(predictor), None, wait)

    def close(self, reason: GsforgetError, wait: float = DRAIN) -> bool:
        """Let no one use the model any more, for this reason; ``swap`` opens the slot again.  Returns as ``swap`` does."""
        with self._changed:
            return self._replace(_Holder(self._holder.predictor), reason, wait)

    def _replace(self, holder: _Holder, reason: GsforgetError | None, wait: float) -> bool:
        before, until = self._holder, time.monotonic() + wait
        self._holder, self._closed = holder, reason
        while before.users and time.monotonic() < until:
            self._changed.wait(until - time.monotonic())
        return not before.users

    def _check_open(self) -> None:
        if self._closed is not None:
            raise self._closed

    def _lease(self, holder: _Holder) -> Lease:
        with self._changed:  # reentrant
            holder.users += 1
            return Lease(self, holder)

    def _release(self, lease: Lease) -> None:
        with self._changed:
            if not lease._released:
                lease._released = True
                lease._holder.users -= 1
                self._changed.notify_all()


def describe(predictor: Predictor) -> dict[str, Any]:
    """Which model it is: ``model_id``, ``sequence``, ``precision``, ``artifact`` and its ``sha256``."""
    info = predictor.info
    return {
        "model_id": info.model_id,
        "sequence": info.sequence,
        "precision": info.precision,
        "artifact": predictor.path.name,
        "sha256": predictor.sha256,
    }

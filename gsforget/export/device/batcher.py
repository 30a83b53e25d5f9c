"""Images of many requests answered together: one thread runs the model, on whatever is waiting, up to a largest batch.

No image waits for others to come: a batch is what arrived while the one before it ran.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gsforget.errors import GsforgetError
from gsforget.export.device.answering import Wish, answer, narrowed
from gsforget.export.device.preprocess import Preprocess, size_of
from gsforget.export.device.slot import Lease, Slot


@dataclass(frozen=True)
class Picture:
    """The bytes of an image file, and what its sender calls it."""

    name: str
    data: bytes


@dataclass
class Answer:
    """What a model says of an image, see `answering`, and a lease of that model, for whoever answers to release."""

    said: dict[str, Any]
    lease: Lease


@dataclass
class _Job:
    picture: Picture
    wish: Wish
    preprocess: Preprocess
    pixels: np.ndarray
    done: Future[Answer] = field(default_factory=Future)

    def fit(self, preprocess: Preprocess) -> np.ndarray:
        """The pixels as a model takes them; a swap may have brought another preprocessing."""
        return self.pixels if preprocess == self.preprocess else preprocess.decode(self.picture.data, self.picture.name)


class Batcher:
    """Runs the model of a slot in a thread of its own.

    Args:
        slot: where the model comes from, batch by batch.
        largest: images in one run.
    """

    def __init__(self, slot: Slot, largest: int = 8):
        self.slot, self.largest = slot, largest
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="gsforget-infer", daemon=True)
        self._thread.start()

    def answer(self, pictures: Sequence[Picture], wish: Wish) -> list[Answer]:
        """Answer images in their order, all by one model; the caller releases the leases.

        Raises RequestError for an image that cannot be read, and what a closed slot raises.
        """
        preprocess = self.slot.current.info.preprocess
        while True:
            jobs = [_Job(p, wish, preprocess, preprocess.decode(p.data, p.name)) for p in pictures]
            with self._changed:
                if self._stopped:
                    raise GsforgetError("The server is stopping.", "Ask again when it has started.", "stopping")
                self._waiting.extend(jobs)
                self._changed.notify()
            answers, failed = self._collect(jobs)
            if failed is None and len({id(a.lease.predictor) for a in answers}) <= 1:
                return answers
            for one in answers:
                one.lease.release()
            if failed is not None:
                raise failed

    def stop(self) -> None:
        """Answer what is waiting, take nothing more, and end the thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    @staticmethod
    def _collect(jobs: list[_Job]) -> tuple[list[Answer], BaseException | None]:
        errors = [job.done.exception() for job in jobs]
        failed = next((e for e in errors if e is not None), None)
        return [job.done.result() for job, error in zip(jobs, errors, strict=True) if error is None], failed

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopped)
                jobs = [self._waiting.popleft() for _ in range(min(self.largest, len(self._waiting)))]
            if not jobs:
                return
            self._run(jobs)

    def _run(self, jobs: list[_Job]) -> None:
        try:
            with self.slot.take() as lease:
                info = lease.predictor.info
                pixels = np.stack([job.fit(info.preprocess) for job in jobs])
                names, sizes = [job.picture.name for job in jobs], [size_of(job.picture.data) for job in jobs]
                most = Wish(max(job.wish.top for job in jobs), min(job.wish.min_score for job in jobs))
                given = answer(lease.predictor, pixels, names, sizes, most)
                answers = [
                    Answer(narrowed(said, job.wish), lease.again()) for job, said in zip(jobs, given, strict=True)
                ]
        except BaseException as error:
            if len(jobs) == 1:
                jobs[0].done.set_exception(error)
            else:  # the fault of one image is not that of the others
                for job in jobs:
                    self._run([job])
            return
        for job, one in zip(jobs, answers, strict=True):
            job.done.set_result(one)

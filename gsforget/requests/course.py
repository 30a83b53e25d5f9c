"""Several requests in order: all are checked before the first run starts, and each run starts from the last one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gsforget.classes import check_remaining, resolve_class
from gsforget.data import ImageFolder
from gsforget.errors import GsforgetError, RequestError
from gsforget.request import Request, check_request
from gsforget.requests.file import Entry
from gsforget.requests.target import Target
from gsforget.tasks import find_task

if TYPE_CHECKING:
    from gsforget.forgetting import Outcome
    from gsforget.source import Source
    from gsforget.training import Event


@dataclass
class Course:
    """Requests that were checked against the model, the data and each other.

    Attributes:
        source: what the next request starts from.
        entries: of the request file.
        targets: what each of them forgets.
        outcomes: of the requests served so far, in order.
    """

    source: Source
    data: ImageFolder
    load: Callable[[Path], np.ndarray]
    base: Request
    entries: list[Entry]
    runs: Path | None = Path("runs")
    out: Path | None = None
    outcomes: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.out is not None and len(self.entries) > 1:
            raise RequestError(
                f"--out names one run folder, the request file holds {len(self.entries)} requests.",
                "Leave out --out: runs are numbered under runs/.",
                "out_of_several",
            )
        self.targets = plan(self.entries, self.base, self.source, self.data)

    @property
    def passed(self) -> bool:
        """Whether all requests are served."""
        return len(self.outcomes) == len(self.entries) and self._sound

    @property
    def _sound(self) -> bool:
        return all(outcome.passed for outcome in self.outcomes)

    @property
    def document(self) -> dict[str, Any]:
        """One request: its document; several: ``{"requests": [documents of those that ran], "verdict"}``."""
        documents = [outcome.document for outcome in self.outcomes]
        if len(self.entries) == 1 and documents:
            return documents[0]
        return {"requests": documents, "verdict": "pass" if self.passed else "fail"}

    def report(self) -> list[str]:
        """Which requests are done, and which are not: sentences."""
        said = []
        for entry, outcome in zip(self.entries, self.outcomes):
            verdict = "done" if outcome.passed else "failed, no model was published"
            said.append(f"{entry.label}: {verdict}{f' ({outcome.folder})' if outcome.folder else ''}")
        return said + [f"{entry.label}: not started" for entry in self.entries[len(self.outcomes) :]]

    def pending(self) -> Iterator[Entry]:
        """The entries still to be served, in order; ends after a failed gate."""
        while self._sound and len(self.outcomes) < len(self.entries):
            yield self.entries[len(self.outcomes)]

    def serve(self, progress: Callable[[Event], None] | None = None) -> Outcome:
        """Serve the next request and publish its run.

        Raises GsforgetError as `forgetting.forget` does; the message then names the entry and what is done.
        """
        from gsforget import forgetting

        entry = self.entries[len(self.outcomes)]
        with _named(entry, len(self.entries) > 1, [e for e in self.report() if ": done" in e]):
            outcome = forgetting.forget(
                self.source, self.data, entry.request(self.base), self.load, self.runs, self.out, progress
            )
        if outcome.passed:
            target = self.targets[len(self.outcomes)]
            self.source = replace(
                self.source,
                config=outcome.config,
                erased=self.source.erased | {i: self.source.names[i] for i in target.classes},
                erased_images=self.source.erased_images | target.sha256(self.data),
                folder=outcome.folder,
            )
        self.outcomes.append(outcome)
        return outcome

    def run(self, progress: Callable[[Event], None] | None = None) -> list[Outcome]:
        """Serve all requests; stops after one whose gate failed."""
        for _ in self.pending():
            self.serve(progress)
        return self.outcomes


def plan(entries: list[Entry], base: Request, source: Source, data: ImageFolder) -> list[Target]:
    """What each entry forgets, once all entries are found to fit the model, the data and each other.

    Args:
        base: what entries leave open.
        source: where the first request starts.

    Raises:
        RequestError: naming file, entry and what to change; ``duplicate_request`` and ``contradiction`` between entries.
    """
    names, task = source.names, find_task(source.config.task)
    asked: dict[int, str] = {}
    kept: dict[int, str] = {}
    images: dict[str, str] = {}
    found = []
    for entry in entries:
        with _named(entry):
            request = entry.request(base)
            check_request(request)
            task.check_request(request)
            target = task.resolve(request, source, data)
            retain = _retained(entry, names, source)
            _refuse_double(target, asked, images, names, data)
            kept |= {k: kept.get(k, entry.label) for k in retain}
            asked |= dict.fromkeys(target.classes, entry.label)
            images |= dict.fromkeys(target.sha256(data), entry.label)
            both = next((k for k in asked if k in kept), None)
            if both is not None:
                raise RequestError(
                    f"class '{names[both]}' is to be forgotten ({asked[both]}) and retained ({kept[both]}).",
                    "Remove it from classes or from retain.",
                    "contradiction",
                )
            check_remaining(list(asked), names, source.erased)
        found.append(target)
    return found


def _retained(entry: Entry, names: list[str], source: Source) -> list[int]:
    """Indices of the classes under ``retain``.  Raises RequestError as `resolve_class`; what is gone cannot be retained."""
    try:
        return [resolve_class(word, names, source.erased) for word in entry.retain]
    except RequestError as error:
        if error.kind == "already_forgotten":
            error.hint = (
                "It cannot be retained any more: remove it from retain, or start from a model that still knows it."
            )
        raise


def _refuse_double(
    target: Target, asked: dict[int, str], images: dict[str, str], names: list[str], data: ImageFolder
) -> None:
    """Refuse classes and images that an earlier entry forgets; `asked` and `images` say which one."""
    single = [] if target.rows is None else sorted({int(k) for k in data.train.labels[target.rows]})
    double = next((k for k in [*target.classes, *single] if k in asked), None)
    if double is not None:
        raise RequestError(
            f"class '{names[double]}' is already forgotten by {asked[double]} of this file.",
            "Remove it from one of them.",
            "duplicate_request",
        )
    again = sorted(target.sha256(data) & images.keys())
    if again:
        raise RequestError(
            f"{len(again)} of its images are already forgotten by {images[again[0]]} of this file.",
            "Remove them from one of the lists.",
            "duplicate_request",
        )


@contextmanager
def _named(entry: Entry, wanted: bool = True, done: list[str] | None = None) -> Iterator[None]:
    """Let errors name the entry, and what was done before it."""
    try:
        yield
    except GsforgetError as error:
        if wanted and not error.message.startswith(entry.where):
            before = f" Done before: {'; '.join(done)}." if done else ""
            error.message = f"{entry.where}: {error.message}{before}"
            error.args = (error.message,)
        raise

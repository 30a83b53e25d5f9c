"""What audits have in common that bring measurements of their own (faces, detection): whom they look at, what the
document says beside the figures, and where it goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsforget import __version__
from gsforget.audit.audit import versions
from gsforget.audit.case import run_of
from gsforget.audit.checks import Check, overall
from gsforget.audit.publish import places_of, write_files
from gsforget.classes import resolve_classes
from gsforget.errors import RequestError
from gsforget.folder import WEIGHTS, sha256
from gsforget.lineage import ancestors, read_request
from gsforget.predict import pick_device
from gsforget.source import Source, load_source

if TYPE_CHECKING:
    from gsforget.audit.case import Ask


@dataclass
class FolderAudit:
    """An audit of a run or model folder, or of a file that was exported from one.

    Attributes:
        subject: what is audited, for a file the model that stands for it; nothing: sentence and hint where nothing was
            forgotten from it.
        original: the model before the forgetting: the one named, else the oldest of the chain whose weights are there.
        forget, old: indices of the newest request and of earlier ones; for a model that is no run, those under --classes.

    Raises RequestError: ``nothing_forgotten``, or as `load_source` and `resolve_classes`.
    """

    ask: Ask
    subject: Source
    nothing: tuple[str, str]
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        ask, subject = self.ask, self.subject
        assert ask.target is not None
        self.target, self.is_file = ask.target, ask.target.is_file()
        self.run = run_of(ask.target)
        self.request = read_request(self.run) if self.run else {}
        named = resolve_classes(list(ask.classes), subject.names, {}) if ask.classes else []
        gone = self.request.get("indices", sorted(subject.erased) if self.is_file else [])
        self.forget = named or [int(k) for k in gone]
        if not self.forget:
            raise RequestError(*self.nothing, "nothing_forgotten")
        self.old = [k for k in sorted(subject.erased) if k not in self.forget]
        self.retained = [k for k in range(len(subject.names)) if k not in (*self.forget, *self.old)]
        there = [a.path for a in ancestors(self.run) if a.weights and a.path is not None] if self.run else []
        folder = ask.original or (there[-1] if there else None)
        self.original = load_source(str(folder), trust_code=ask.trust_code) if folder else None

    @property
    def sides(self) -> list[Source]:
        """The subject, and the original where it is at hand."""
        return [self.subject, *([self.original] if self.original else [])]

    def document(self, made: list[Check], **more: Any) -> dict[str, Any]:
        """The document of `gsforget audit`; `more` brings task, reference, data, classes, details and not_tested."""
        original = self.original.folder if self.original else None
        return {
            "gsforget": __version__,
            "tier": self.ask.tier,
            "kind": self.target.suffix.lower().removeprefix(".")
            if self.is_file
            else "run"
            if self.request
            else "model",
            "subject": str(self.target),
            "original": str(original) if self.original else None,
            "sha256": {
                **({"artifact": sha256(self.target)} if self.is_file else {}),
                "model": self._model_sha256(),
                "original": sha256(original / WEIGHTS) if original else None,
                "reference": None,
            },
            "sequence": self.subject.sequence,
            "seed": self.ask.seed,
            "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "versions": versions(),
            "device": str(pick_device(self.ask.device)),
            "audited": [*self.forget, *self.old],
            "checks": [c.to_json() for c in made],
            "verdict": overall(made),
            "seconds": round(time.perf_counter() - self.started, 2),
            **more,
        }

    def _model_sha256(self) -> str | None:
        folder = self.run if self.is_file else self.target
        return sha256(folder / WEIGHTS) if folder and (folder / WEIGHTS).is_file() else None

    def write(
        self,
        document: dict[str, Any],
        out: Path | None,
        examples: Callable[[], list[Any] | None] = lambda: None,
    ) -> None:
        """audit.json and report.html in the run, or where `out` says; nothing for a model folder that is no run.

        Those of an exported file carry its name.
        """
        run = self.run if self.request else None
        suffix = f"-{self.target.stem}" if self.is_file else ""
        looked_at = [self.target, *([self.original.folder] if self.original and self.original.folder else [])]
        write_files(places_of(run, looked_at, out, suffix), document, run, examples)

"""The records of a device folder: what it holds, how it came about, and what was begun and must be finished."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gsforget.canonical import canonical, line_sha256
from gsforget.export.device.changes import SUFFIXES
from gsforget.export.device.files import is_plain_name

FORMAT = 1
KINDS = ("install", "patch", "full")


@dataclass(frozen=True)
class Held:
    """An artifact in `models/`: its name, kind, SHA-256 and length, and the SHA-256 of its sidecar."""

    name: str
    kind: str
    sha256: str
    bytes: int
    sidecar: str

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Held:
        """Raises KeyError, TypeError or ValueError for anything but what `asdict` gives."""
        made = cls(**raw)
        digests = (made.sha256, made.sidecar)
        if made.kind not in SUFFIXES or not is_plain_name(made.name) or not made.name.endswith(SUFFIXES[made.kind]):
            raise ValueError(f"artifact {made.name!r}")
        if not all(re.fullmatch("[0-9a-f]{64}", d) for d in digests) or type(made.bytes) is not int:
            raise ValueError(f"hashes of {made.name}")
        return made


@dataclass(frozen=True)
class State:
    """What the device holds now: the counter and its artifacts; ``ledger`` is the SHA-256 of the last ledger line."""

    model_id: str
    sequence: int
    precision: str
    artifacts: tuple[Held, ...]
    key_id: str | None
    ledger: str

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "artifacts": [asdict(a) for a in self.artifacts]}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> State:
        artifacts = tuple(Held.from_json(a) for a in raw["artifacts"])
        names = ("model_id", "sequence", "precision", "key_id", "ledger")
        made = cls(**{k: raw[k] for k in names}, artifacts=artifacts)
        _check_same(made.to_json(), raw)
        return made


@dataclass(frozen=True)
class Entry:
    """A ledger line.

    Attributes:
        kind: ``install`` (from an exported artifact), ``patch`` or ``full``.
        manifest: SHA-256 of the package's manifest; None of an install.
        key_id: that signed the package; None of an install.
        time: UTC, to the second.
        previous: SHA-256 of the line before it.
        replaced: of a repair where the ledger itself was broken: SHA-256 of that file.
    """

    model_id: str
    sequence: int
    kind: str
    precision: str
    artifacts: tuple[Held, ...]
    manifest: str | None
    key_id: str | None
    time: str
    previous: str
    replaced: str | None = None

    def line(self) -> str:
        return canonical({**asdict(self), "artifacts": [asdict(a) for a in self.artifacts]})

    def state(self) -> State:
        """The state after this line."""
        digest = line_sha256(self.line())
        return State(self.model_id, self.sequence, self.precision, self.artifacts, self.key_id, digest)

    @classmethod
    def parse(cls, line: str) -> Entry:
        raw = json.loads(line)
        made = cls(**{**raw, "artifacts": tuple(Held.from_json(a) for a in raw["artifacts"])})
        if made.line() != line or made.kind not in KINDS or type(made.sequence) is not int or made.sequence < 0:
            raise ValueError("not a ledger line")
        return made


@dataclass(frozen=True)
class Made:
    """An artifact that an intent makes.

    Attributes:
        name: its new name.
        base: the old file that it is made from; None: from the payload.
        source: of an engine that follows its ONNX file (see `follow`): the new ONNX file; else None.
    """

    name: str
    base: str | None
    source: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "base": self.base, **({"source": self.source} if self.source else {})}


@dataclass(frozen=True)
class Intent:
    """What was begun and has to be finished before anything loads.

    Attributes:
        kind: as of a ledger line.
        model_id, sequence: after it.
        manifest: SHA-256 of the manifest of `pending.gsf`; None of an install.
        ledger: SHA-256 of the ledger's last line before it.
        replaced: SHA-256 of a broken ledger that a repair begins anew; else None.
        artifacts: what is made; all else in `models/` is deleted afterwards.
    """

    kind: str
    model_id: str
    sequence: int
    manifest: str | None
    ledger: str
    replaced: str | None
    artifacts: tuple[Made, ...]

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "artifacts": [a.to_json() for a in self.artifacts]}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Intent:
        made = cls(
            **{k: v for k, v in raw.items() if k not in ("format", "artifacts")},
            artifacts=tuple(Made(**a) for a in raw["artifacts"]),
        )
        _check_same(made.to_json(), raw)
        names = [name for a in made.artifacts for name in (a.name, a.base, a.source) if name is not None]
        if made.kind not in KINDS or not all(is_plain_name(n) for n in names) or type(made.sequence) is not int:
            raise ValueError("not an intent record")
        return made


def _check_same(made: dict[str, Any], raw: Mapping[str, Any]) -> None:
    if made != raw or type(raw["sequence"]) is not int:
        raise ValueError("other fields than a device writes")

"""What a package says about itself, checked field by field: a manifest is a stranger's text until its signature holds.

Every field is there, of its type and within bounds, and no other field is; names are plain file names; offsets lie
inside the payload and the old file, in ascending order and without overlap.  `docs/patches.md` describes the format.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from gsforget.canonical import canonical
from gsforget.errors import RequestError, SafetyError
from gsforget.export.device.changes import GiveEdit, PatchedArtifact, TensorChange
from gsforget.export.device.metadata import ArtifactInfo
from gsforget.export.device.strict_json import (
    TIME,
    BadField,
    choice,
    hexadecimal,
    integer,
    items,
    moment,
    number,
    record,
)

FORMAT = 1
SCHEME = "x25519-hkdf-sha256-chacha20poly1305"
TAG = 16  # bytes that the encryption adds
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
HINT = "Ask for the package again where it was built; this one was damaged or tampered with."
MOST_ANSWERS = 64  # images that the known answers may ask for, in one test and in number of tests


@dataclass(frozen=True)
class KnownAnswer:
    """Logits ``new`` [batch, classes] on noise from a seed, and how far the old model's logits lie from them."""

    seed: int
    batch: int
    new: tuple[tuple[float, ...], ...]
    old_distance: float

    def to_json(self) -> dict[str, Any]:
        new = [list(row) for row in self.new]
        return {"seed": self.seed, "batch": self.batch, "new": new, "old_distance": self.old_distance}

    @classmethod
    def from_json(cls, raw: Any, where: str) -> KnownAnswer:
        t = record(raw, where, "seed batch new old_distance")
        batch = integer(t["batch"], f"{where}.batch", 1, MOST_ANSWERS)
        rows = items(t["new"], f"{where}.new", batch)
        new = tuple(tuple(number(v, f"{where}.new") for v in items(row, f"{where}.new")) for row in rows)
        distance = number(t["old_distance"], f"{where}.old_distance")
        return cls(integer(t["seed"], f"{where}.seed"), batch, new, distance)


@dataclass(frozen=True)
class KnownAnswers:
    """Tests of the loaded model: the largest difference of any logit must be at most ``tolerance``."""

    tolerance: float
    tests: tuple[KnownAnswer, ...]

    def to_json(self) -> dict[str, Any]:
        return {"tolerance": self.tolerance, "tests": [test.to_json() for test in self.tests]}

    @classmethod
    def from_json(cls, raw: Any) -> KnownAnswers:
        k = record(raw, "known_answers", "tolerance tests")
        tests = _each(KnownAnswer, k["tests"], "known_answers.tests")
        tolerance = number(k["tolerance"], "known_answers.tolerance")
        if tolerance <= 0 or len(tests) > MOST_ANSWERS:
            raise BadField("known_answers needs a tolerance above 0 and at most 64 tests")
        return cls(tolerance, tests)


@dataclass(frozen=True)
class Encryption:
    """How a payload was encrypted: for which key, with which one-time key and nonce (hexadecimal)."""

    recipient: str
    ephemeral: str
    nonce: str

    def to_json(self) -> dict[str, Any]:
        return {
            "scheme": SCHEME,
            "recipient": self.recipient,
            "ephemeral": self.ephemeral,
            "nonce": self.nonce,
        }

    @classmethod
    def from_json(cls, raw: Any) -> Encryption:
        e = record(raw, "payload.encryption", "scheme recipient ephemeral nonce")
        choice(e["scheme"], "payload.encryption.scheme", (SCHEME,))
        parts = (("recipient", 16), ("ephemeral", 64), ("nonce", 24))
        return cls(*(hexadecimal(e[k], f"payload.encryption.{k}", n) for k, n in parts))


@dataclass(frozen=True)
class Payload:
    """The stored bytes (``bytes``, ``sha256``) and what they hold once decrypted; the same where not encrypted."""

    bytes: int
    sha256: str
    plain_bytes: int
    plain_sha256: str
    encryption: Encryption | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "bytes": self.bytes,
            "sha256": self.sha256,
            "plain_bytes": self.plain_bytes,
            "plain_sha256": self.plain_sha256,
            "encryption": self.encryption.to_json() if self.encryption else None,
        }

    @classmethod
    def from_json(cls, raw: Any) -> Payload:
        p = record(raw, "payload", "bytes sha256 plain_bytes plain_sha256 encryption")
        encryption = None if p["encryption"] is None else Encryption.from_json(p["encryption"])
        payload = cls(
            integer(p["bytes"], "payload.bytes"),
            hexadecimal(p["sha256"], "payload.sha256", 64),
            integer(p["plain_bytes"], "payload.plain_bytes"),
            hexadecimal(p["plain_sha256"], "payload.plain_sha256", 64),
            encryption,
        )
        if payload.bytes - payload.plain_bytes != (TAG if encryption else 0):
            raise BadField("payload.bytes does not fit payload.plain_bytes")
        if encryption is None and payload.sha256 != payload.plain_sha256:
            raise BadField("payload.sha256 and payload.plain_sha256 differ, yet nothing is encrypted")
        return payload


@dataclass(frozen=True)
class Manifest:
    """All that is signed.

    Attributes:
        kind: ``patch`` or ``full``.
        model_id: 16 hexadecimal digits, which chain of erasures it belongs to.
        sequence: number of erasures after it.
        requires: the sequence before it, ``sequence - 1``; None in a full package.
        precision: of the artifacts.
        created, expires: UTC, to the second; ``expires`` may be None.
        key_id: of the signing key.
        info: what the artifacts say about themselves afterwards.
        payload, tensors, artifacts, known_answers: see the classes.
    """

    kind: str
    model_id: str
    sequence: int
    requires: int | None
    precision: str
    created: datetime
    expires: datetime | None
    key_id: str
    info: ArtifactInfo
    payload: Payload
    tensors: tuple[TensorChange, ...]
    artifacts: tuple[PatchedArtifact, ...]
    known_answers: KnownAnswers

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "kind": self.kind,
            "model_id": self.model_id,
            "sequence": self.sequence,
            "requires": self.requires,
            "precision": self.precision,
            "created": self.created.strftime(TIME),
            "expires": self.expires.strftime(TIME) if self.expires else None,
            "key_id": self.key_id,
            "info": self.info.to_json(),
            "payload": self.payload.to_json(),
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "artifacts": [artifact.to_json() for artifact in self.artifacts],
            "known_answers": self.known_answers.to_json(),
        }

    @classmethod
    def parse(cls, raw: bytes, where: str = "The package") -> Manifest:
        """From a manifest's bytes.  Raises SafetyError ``bad_package`` for anything but a canonical, valid manifest."""
        try:
            content = json.loads(raw.decode())
            if canonical(content).encode() != raw:
                raise BadField("its manifest is not canonical JSON")
        except (ValueError, RecursionError, TypeError) as error:
            raise bad_package(where, "its manifest is not JSON in UTF-8") from error
        except BadField as error:
            raise bad_package(where, str(error)) from error
        return cls.from_json(content, where)

    @classmethod
    def from_json(cls, raw: Any, where: str = "The package") -> Manifest:
        """From a manifest's content.  Raises SafetyError ``bad_package`` naming the first field that is wrong."""
        try:
            made = _manifest(raw)
            _check_whole(made)
        except BadField as error:
            raise bad_package(where, str(error)) from error
        return made


def bad_package(where: str, why: str) -> SafetyError:
    """The refusal of a package that is not whole or not well formed."""
    return SafetyError(f"{where} is not a valid package: {why}.", HINT, "bad_package")


def _manifest(raw: Any) -> Manifest:
    keys = "format kind model_id sequence requires precision created expires key_id info payload tensors artifacts known_answers"
    m = record(raw, "manifest", keys)
    if m["format"] != FORMAT or m["format"] is True:
        raise BadField(f"its format is {m['format']!r}, and this gsforget reads format {FORMAT}")
    kind = choice(m["kind"], "kind", ("patch", "full"))
    return Manifest(
        kind=kind,
        model_id=hexadecimal(m["model_id"], "model_id", 16),
        sequence=integer(m["sequence"], "sequence"),
        requires=None if m["requires"] is None else integer(m["requires"], "requires"),
        precision=choice(m["precision"], "precision", PRECISIONS),
        created=moment(m["created"], "created"),
        expires=None if m["expires"] is None else moment(m["expires"], "expires"),
        key_id=hexadecimal(m["key_id"], "key_id", 16),
        info=_info(m["info"]),
        payload=Payload.from_json(m["payload"]),
        tensors=_each(TensorChange, m["tensors"], "tensors"),
        artifacts=_each(PatchedArtifact, m["artifacts"], "artifacts"),
        known_answers=KnownAnswers.from_json(m["known_answers"]),
    )


def _each(kind: Any, raw: Any, where: str) -> tuple[Any, ...]:
    return tuple(kind.from_json(one, f"{where}[{i}]") for i, one in enumerate(items(raw, where)))


def _info(raw: Any) -> ArtifactInfo:
    try:
        info = ArtifactInfo.from_json(raw)
        same = canonical(info.to_json()) == canonical(raw)
    except (RequestError, ValueError, TypeError, OverflowError) as error:
        raise BadField(f"info cannot be used ({getattr(error, 'message', error)})") from error
    if not same:
        raise BadField("info holds fields or types that it must not have")
    return info


def _check_whole(m: Manifest) -> None:
    """What fields must be to each other."""
    if (m.info.model_id, m.info.sequence, m.info.precision) != (m.model_id, m.sequence, m.precision):
        raise BadField("info is not of the model, sequence and precision that the manifest names")
    named = [i for i in m.info.forgotten if m.info.class_names[i] != f"forgotten-{i}"]
    if named:
        raise BadField(f"info still names the erased class {named[0]}")
    columns = {len(row) for test in m.known_answers.tests for row in test.new}
    if m.info.task == "classify" and columns - {len(m.info.class_names)}:
        raise BadField("known_answers do not have one logit per class")
    if len(columns) > 1:
        raise BadField("known_answers differ in their number of values")
    for what, names in (
        ("tensors", [t.name for t in m.tensors]),
        ("artifacts", [a.name.casefold() for a in m.artifacts]),
    ):
        if len(set(names)) != len(names):
            raise BadField(f"{what} names one of them twice")
    if m.kind == "full":
        _check_full(m)
        return
    if m.sequence < 1 or m.requires != m.sequence - 1:
        raise BadField(f"requires is {m.requires}, where patch {m.sequence} needs {m.sequence - 1}")
    if not m.info.forgotten:
        raise BadField("info names no erased class, yet this is an erasure patch")
    if not m.artifacts or not m.known_answers.tests:
        raise BadField("a patch needs an artifact and a known answer")
    _check_data(m)
    _check_tensors(m)
    for i, artifact in enumerate(m.artifacts):
        _check_edits(m, artifact, f"artifacts[{i}]")
    if len({a.before.sha256 for a in m.artifacts if a.before}) != len(m.artifacts):
        raise BadField("two artifacts are made from the same file")


def _check_full(m: Manifest) -> None:
    kinds = [a.kind for a in m.artifacts]
    if m.requires is not None or m.tensors or kinds.count("onnx") + kinds.count("engine") != 1:
        raise BadField("a full package has one artifact, with its data if any, no tensors, and requires nothing")
    _check_data(m)
    if any(a.before is not None or a.edits or a.rest_sha256 is not None for a in m.artifacts):
        raise BadField("the artifact of a full package has nothing from before")
    if sum(a.after.bytes for a in m.artifacts) != m.payload.plain_bytes:
        raise BadField("the payload is not the artifact")
    if len(m.artifacts) == 1 and m.artifacts[0].after.sha256 != m.payload.plain_sha256:
        raise BadField("the payload is not the artifact")


def _check_data(m: Manifest) -> None:
    kinds = {a.kind for a in m.artifacts}
    if "data" in kinds and "onnx" not in kinds:
        raise BadField("data belongs to an ONNX file, and there is none")


def _check_tensors(m: Manifest) -> None:
    for i, t in enumerate(m.tensors):
        rows, columns = t.shape
        sizes = [2 * t.rank * columns, 2 * rows * t.rank, 4 * t.rank, 4 * t.rank]
        parts = list(zip(t.at, sizes))
        if t.scale is not None:
            size = 4 * (1 if t.scale.axis is None else t.shape[t.scale.axis])
            parts += [(t.scale.before, size), (t.scale.after, size)]
        if any(at + size > m.payload.plain_bytes for at, size in parts):
            raise BadField(f"tensors[{i}] reaches beyond the payload")


def _check_edits(m: Manifest, artifact: PatchedArtifact, where: str) -> None:
    if artifact.before is None or artifact.rest_sha256 is None or not artifact.edits:
        raise BadField(f"{where} lacks what it is made from")
    tensors = {t.name: t for t in m.tensors}
    end, length = 0, artifact.before.bytes
    for i, edit in enumerate(artifact.edits):
        if edit.at < end or edit.at + edit.take > artifact.before.bytes:
            raise BadField(f"{where}.edits[{i}] overlaps the one before it or reaches beyond the file")
        end = edit.at + edit.take
        if isinstance(edit, GiveEdit):
            if sum(edit.give) > m.payload.plain_bytes:
                raise BadField(f"{where}.edits[{i}] reaches beyond the payload")
            length += edit.give[1] - edit.take
        elif edit.tensor not in tensors or tensors[edit.tensor].bytes != edit.take:
            raise BadField(f"{where}.edits[{i}] does not fit a tensor of the manifest")
    if length != artifact.after.bytes:
        raise BadField(f"{where}.after has another length than its edits give")

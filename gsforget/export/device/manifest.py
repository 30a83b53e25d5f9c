"""What a package says about itself, checked field by field: a manifest is a stranger's text until its signature holds.

Every field is there, of its type and within bounds, and no other field is; names are plain file names; offsets lie
inside the payload and the old file, in ascending order and without overlap.  `docs/patches.md` describes the format.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from gsforget.canonical import canonical
from gsforget.errors import RequestError, SafetyError
from gsforget.export.device.metadata import ArtifactInfo

FORMAT = 1
SCHEME = "x25519-hkdf-sha256-chacha20poly1305"
TAG = 16  # bytes that the encryption adds
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}  # bytes of an element
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
SUFFIXES = {"onnx": ".onnx", "engine": ".engine"}
HINT = "Ask for the package again where it was built; this one was damaged or tampered with."
LARGEST = 2**53  # beyond it, JSON's numbers are not integers everywhere
MOST_ANSWERS = 64  # images that the known answers may ask for, in one test and in number of tests
TIME = "%Y-%m-%dT%H:%M:%SZ"
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # devices, on Windows


@dataclass(frozen=True)
class Scale:
    """Frozen scales of an int8 tensor: float32 little-endian at an offset of the payload, per tensor or along an axis."""

    at: int
    axis: int | None

    def to_json(self) -> dict[str, Any]:
        return {"at": self.at, "axis": self.axis}


@dataclass(frozen=True)
class TensorChange:
    """A low-rank change of one tensor.

    Attributes:
        name: of the parameter, in the state dict.
        dtype: a key of ``DTYPES``; little-endian.
        shape: rows (outputs) and columns (inputs).
        rank: number of components.
        at: offsets in the payload of int16 ``a`` [rank, columns], int16 ``b`` [rows, rank], int32 ``ea`` and ``eb``
            [rank], all little-endian.
        before, after: SHA-256 of the tensor's bytes, rows first.
        scale: of an int8 tensor, else None.
    """

    name: str
    dtype: str
    shape: tuple[int, int]
    rank: int
    at: tuple[int, int, int, int]
    before: str
    after: str
    scale: Scale | None = None

    @property
    def bytes(self) -> int:
        return self.shape[0] * self.shape[1] * DTYPES[self.dtype]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "rank": self.rank,
            "at": list(self.at),
            "before": self.before,
            "after": self.after,
            "scale": self.scale.to_json() if self.scale else None,
        }


@dataclass(frozen=True)
class TensorEdit:
    """Bytes ``at`` of the old file are replaced by a tensor's new bytes, columns first where ``transposed``."""

    at: int
    take: int
    tensor: str
    transposed: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "at": self.at,
            "take": self.take,
            "tensor": self.tensor,
            "transposed": self.transposed,
            "order": "little",
        }


@dataclass(frozen=True)
class GiveEdit:
    """``take`` bytes ``at`` of the old file are replaced by a part (offset, bytes) of the payload, longer or shorter."""

    at: int
    take: int
    give: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        return {"at": self.at, "take": self.take, "give": list(self.give)}


@dataclass(frozen=True)
class Digest:
    """SHA-256 and length of a whole file."""

    sha256: str
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return {"sha256": self.sha256, "bytes": self.bytes}


@dataclass(frozen=True)
class Builder:
    """What built an engine, and its smallest, usual and largest batch."""

    name: str
    version: str
    batch: tuple[int, int, int]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "version": self.version, "batch": list(self.batch)}


@dataclass(frozen=True)
class PatchedArtifact:
    """A file that a package makes: from an old one by edits, or, in a full package, from the payload alone.

    Attributes:
        kind: ``onnx`` or ``engine``.
        name: of the new file; a plain name with the kind's suffix.
        targets: GPUs of an engine, such as ``sm86``.
        builder: of an engine.
        before: the old file; None in a full package.
        after: the new file.
        edits: in ascending order, without overlap; empty in a full package.
        rest_sha256: SHA-256 of the old file without the edited ranges; None in a full package.
    """

    kind: str
    name: str
    targets: tuple[str, ...]
    builder: Builder | None
    before: Digest | None
    after: Digest
    edits: tuple[TensorEdit | GiveEdit, ...] = ()
    rest_sha256: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self.name,
            "targets": list(self.targets),
            "builder": self.builder.to_json() if self.builder else None,
            "before": self.before.to_json() if self.before else None,
            "after": self.after.to_json(),
            "edits": [edit.to_json() for edit in self.edits],
            "rest_sha256": self.rest_sha256,
        }


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


@dataclass(frozen=True)
class KnownAnswers:
    """Tests of the loaded model: the largest difference of any logit must be at most ``tolerance``."""

    tolerance: float
    tests: tuple[KnownAnswer, ...]

    def to_json(self) -> dict[str, Any]:
        return {"tolerance": self.tolerance, "tests": [test.to_json() for test in self.tests]}


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
                raise _Bad("its manifest is not canonical JSON")
        except (ValueError, RecursionError, TypeError) as error:
            raise bad_package(where, "its manifest is not JSON in UTF-8") from error
        except _Bad as error:
            raise bad_package(where, str(error)) from error
        return cls.from_json(content, where)

    @classmethod
    def from_json(cls, raw: Any, where: str = "The package") -> Manifest:
        """From a manifest's content.  Raises SafetyError ``bad_package`` naming the first field that is wrong."""
        try:
            made = _manifest(raw)
            _check_whole(made)
        except _Bad as error:
            raise bad_package(where, str(error)) from error
        return made


def is_plain_name(name: str) -> bool:
    """Whether a text can only be the name of a file inside the folder where it is put, on any system."""
    if not 1 <= len(name.encode(errors="replace")) <= 200 or name != name.strip() or name.endswith("."):
        return False
    plain = all(c.isprintable() and c not in '/\\:*?"<>|' for c in name)
    return plain and not name.startswith(".") and not RESERVED.fullmatch(name)


def bad_package(where: str, why: str) -> SafetyError:
    """The refusal of a package that is not whole or not well formed."""
    return SafetyError(f"{where} is not a valid package: {why}.", HINT, "bad_package")


class _Bad(Exception):
    """A field that is wrong; becomes a SafetyError that names the file."""


def _manifest(raw: Any) -> Manifest:
    keys = "format kind model_id sequence requires precision created expires key_id info payload tensors artifacts known_answers"
    m = _fields(raw, "manifest", keys)
    if m["format"] != FORMAT or m["format"] is True:
        raise _Bad(f"its format is {m['format']!r}, and this gsforget reads format {FORMAT}")
    kind = _choice(m["kind"], "kind", ("patch", "full"))
    return Manifest(
        kind=kind,
        model_id=_hex(m["model_id"], "model_id", 16),
        sequence=_int(m["sequence"], "sequence"),
        requires=None if m["requires"] is None else _int(m["requires"], "requires"),
        precision=_choice(m["precision"], "precision", PRECISIONS),
        created=_time(m["created"], "created"),
        expires=None if m["expires"] is None else _time(m["expires"], "expires"),
        key_id=_hex(m["key_id"], "key_id", 16),
        info=_info(m["info"]),
        payload=_payload(m["payload"]),
        tensors=tuple(_tensor(t, f"tensors[{i}]") for i, t in enumerate(_list(m["tensors"], "tensors"))),
        artifacts=tuple(_artifact(a, f"artifacts[{i}]") for i, a in enumerate(_list(m["artifacts"], "artifacts"))),
        known_answers=_answers(m["known_answers"]),
    )


def _info(raw: Any) -> ArtifactInfo:
    try:
        info = ArtifactInfo.from_json(raw)
        same = canonical(info.to_json()) == canonical(raw)
    except (RequestError, ValueError, TypeError, OverflowError) as error:
        raise _Bad(f"info cannot be used ({getattr(error, 'message', error)})") from error
    if not same:
        raise _Bad("info holds fields or types that it must not have")
    return info


def _payload(raw: Any) -> Payload:
    p = _fields(raw, "payload", "bytes sha256 plain_bytes plain_sha256 encryption")
    encryption = None
    if p["encryption"] is not None:
        e = _fields(p["encryption"], "payload.encryption", "scheme recipient ephemeral nonce")
        _choice(e["scheme"], "payload.encryption.scheme", (SCHEME,))
        parts = (("recipient", 16), ("ephemeral", 64), ("nonce", 24))
        encryption = Encryption(*(_hex(e[k], f"payload.encryption.{k}", n) for k, n in parts))
    payload = Payload(
        _int(p["bytes"], "payload.bytes"),
        _hex(p["sha256"], "payload.sha256", 64),
        _int(p["plain_bytes"], "payload.plain_bytes"),
        _hex(p["plain_sha256"], "payload.plain_sha256", 64),
        encryption,
    )
    if payload.bytes - payload.plain_bytes != (TAG if encryption else 0):
        raise _Bad("payload.bytes does not fit payload.plain_bytes")
    if encryption is None and payload.sha256 != payload.plain_sha256:
        raise _Bad("payload.sha256 and payload.plain_sha256 differ, yet nothing is encrypted")
    return payload


def _tensor(raw: Any, where: str) -> TensorChange:
    t = _fields(raw, where, "name dtype shape rank at before after scale")
    rows, columns = (_int(n, f"{where}.shape", 1, 2**31) for n in _list(t["shape"], f"{where}.shape", 2))
    a, b, ea, eb = (_int(n, f"{where}.at") for n in _list(t["at"], f"{where}.at", 4))
    dtype = _choice(t["dtype"], f"{where}.dtype", DTYPES)
    scale = None
    if t["scale"] is not None:
        s = _fields(t["scale"], f"{where}.scale", "at axis")
        axis = None if s["axis"] is None else _int(s["axis"], f"{where}.scale.axis", 0, 1)
        scale = Scale(_int(s["at"], f"{where}.scale.at"), axis)
    if (scale is not None) != (dtype == "int8"):
        raise _Bad(f"{where}.scale must be there for int8, and only then")
    return TensorChange(
        _text(t["name"], f"{where}.name"),
        dtype,
        (rows, columns),
        _int(t["rank"], f"{where}.rank", 1, 4096),
        (a, b, ea, eb),
        _hex(t["before"], f"{where}.before", 64),
        _hex(t["after"], f"{where}.after", 64),
        scale,
    )


def _artifact(raw: Any, where: str) -> PatchedArtifact:
    a = _fields(raw, where, "kind name targets builder before after edits rest_sha256")
    kind, name = _choice(a["kind"], f"{where}.kind", SUFFIXES), _text(a["name"], f"{where}.name")
    if not is_plain_name(name) or not name.endswith(SUFFIXES[kind]):
        raise _Bad(f"{where}.name {name!r} is not a plain file name that ends in {SUFFIXES[kind]}")
    targets = tuple(_text(t, f"{where}.targets") for t in _list(a["targets"], f"{where}.targets"))
    if not all(re.fullmatch(r"sm\d{2,3}", t) for t in targets):
        raise _Bad(f"{where}.targets are not GPUs such as sm86")
    builder = None
    if a["builder"] is not None:
        b = _fields(a["builder"], f"{where}.builder", "name version batch")
        low, usual, high = (
            _int(n, f"{where}.builder.batch", 1) for n in _list(b["batch"], f"{where}.builder.batch", 3)
        )
        name_of, version = (_text(b[k], f"{where}.builder.{k}") for k in ("name", "version"))
        builder = Builder(name_of, version, (low, usual, high))
    before = None if a["before"] is None else _digest(a["before"], f"{where}.before")
    rest = None if a["rest_sha256"] is None else _hex(a["rest_sha256"], f"{where}.rest_sha256", 64)
    edits = tuple(_edit(e, f"{where}.edits[{i}]") for i, e in enumerate(_list(a["edits"], f"{where}.edits")))
    return PatchedArtifact(kind, name, targets, builder, before, _digest(a["after"], f"{where}.after"), edits, rest)


def _edit(raw: Any, where: str) -> TensorEdit | GiveEdit:
    if isinstance(raw, dict) and "give" in raw:
        e = _fields(raw, where, "at take give")
        at, take = _int(e["at"], f"{where}.at"), _int(e["take"], f"{where}.take")
        start, size = (_int(n, f"{where}.give") for n in _list(e["give"], f"{where}.give", 2))
        return GiveEdit(at, take, (start, size))
    e = _fields(raw, where, "at take tensor transposed order")
    _choice(e["order"], f"{where}.order", ("little",))
    if not isinstance(e["transposed"], bool):
        raise _Bad(f"{where}.transposed is not true or false")
    at, take = _int(e["at"], f"{where}.at"), _int(e["take"], f"{where}.take")
    return TensorEdit(at, take, _text(e["tensor"], f"{where}.tensor"), e["transposed"])


def _digest(raw: Any, where: str) -> Digest:
    d = _fields(raw, where, "sha256 bytes")
    return Digest(_hex(d["sha256"], f"{where}.sha256", 64), _int(d["bytes"], f"{where}.bytes", 1))


def _answers(raw: Any) -> KnownAnswers:
    k = _fields(raw, "known_answers", "tolerance tests")
    tests = []
    for i, raw_test in enumerate(_list(k["tests"], "known_answers.tests")):
        where = f"known_answers.tests[{i}]"
        t = _fields(raw_test, where, "seed batch new old_distance")
        batch = _int(t["batch"], f"{where}.batch", 1, MOST_ANSWERS)
        rows = _list(t["new"], f"{where}.new", batch)
        new = tuple(tuple(_number(v, f"{where}.new") for v in _list(row, f"{where}.new")) for row in rows)
        distance = _number(t["old_distance"], f"{where}.old_distance")
        tests.append(KnownAnswer(_int(t["seed"], f"{where}.seed"), batch, new, distance))
    tolerance = _number(k["tolerance"], "known_answers.tolerance")
    if tolerance <= 0 or len(tests) > MOST_ANSWERS:
        raise _Bad("known_answers needs a tolerance above 0 and at most 64 tests")
    return KnownAnswers(tolerance, tuple(tests))


def _check_whole(m: Manifest) -> None:
    """What fields must be to each other."""
    if (m.info.model_id, m.info.sequence, m.info.precision) != (m.model_id, m.sequence, m.precision):
        raise _Bad("info is not of the model, sequence and precision that the manifest names")
    named = [i for i in m.info.forgotten if m.info.class_names[i] != f"forgotten-{i}"]
    if named:
        raise _Bad(f"info still names the erased class {named[0]}")
    if any(len(row) != len(m.info.class_names) for test in m.known_answers.tests for row in test.new):
        raise _Bad("known_answers do not have one logit per class")
    for what, names in (
        ("tensors", [t.name for t in m.tensors]),
        ("artifacts", [a.name.casefold() for a in m.artifacts]),
    ):
        if len(set(names)) != len(names):
            raise _Bad(f"{what} names one of them twice")
    if m.kind == "full":
        _check_full(m)
        return
    if m.sequence < 1 or m.requires != m.sequence - 1:
        raise _Bad(f"requires is {m.requires}, where patch {m.sequence} needs {m.sequence - 1}")
    if not m.info.forgotten:
        raise _Bad("info names no erased class, yet this is an erasure patch")
    if not m.artifacts or not m.known_answers.tests:
        raise _Bad("a patch needs an artifact and a known answer")
    _check_tensors(m)
    for i, artifact in enumerate(m.artifacts):
        _check_edits(m, artifact, f"artifacts[{i}]")
    if len({a.before.sha256 for a in m.artifacts if a.before}) != len(m.artifacts):
        raise _Bad("two artifacts are made from the same file")


def _check_full(m: Manifest) -> None:
    if m.requires is not None or m.tensors or len(m.artifacts) != 1:
        raise _Bad("a full package has one artifact, no tensors, and requires nothing")
    only = m.artifacts[0]
    if only.before is not None or only.edits or only.rest_sha256 is not None:
        raise _Bad("the artifact of a full package has nothing from before")
    if (only.after.bytes, only.after.sha256) != (m.payload.plain_bytes, m.payload.plain_sha256):
        raise _Bad("the payload is not the artifact")


def _check_tensors(m: Manifest) -> None:
    for i, t in enumerate(m.tensors):
        rows, columns = t.shape
        sizes = [2 * t.rank * columns, 2 * rows * t.rank, 4 * t.rank, 4 * t.rank]
        parts = list(zip(t.at, sizes))
        if t.scale is not None:
            parts.append((t.scale.at, 4 * (1 if t.scale.axis is None else t.shape[t.scale.axis])))
        if any(at + size > m.payload.plain_bytes for at, size in parts):
            raise _Bad(f"tensors[{i}] reaches beyond the payload")


def _check_edits(m: Manifest, artifact: PatchedArtifact, where: str) -> None:
    if artifact.before is None or artifact.rest_sha256 is None or not artifact.edits:
        raise _Bad(f"{where} lacks what it is made from")
    tensors = {t.name: t for t in m.tensors}
    end, length = 0, artifact.before.bytes
    for i, edit in enumerate(artifact.edits):
        if edit.at < end or edit.at + edit.take > artifact.before.bytes:
            raise _Bad(f"{where}.edits[{i}] overlaps the one before it or reaches beyond the file")
        end = edit.at + edit.take
        if isinstance(edit, GiveEdit):
            if sum(edit.give) > m.payload.plain_bytes:
                raise _Bad(f"{where}.edits[{i}] reaches beyond the payload")
            length += edit.give[1] - edit.take
        elif edit.tensor not in tensors or tensors[edit.tensor].bytes != edit.take:
            raise _Bad(f"{where}.edits[{i}] does not fit a tensor of the manifest")
    if length != artifact.after.bytes:
        raise _Bad(f"{where}.after has another length than its edits give")


def _fields(raw: Any, where: str, keys: str) -> Mapping[str, Any]:
    wanted = keys.split()
    if not isinstance(raw, dict) or set(raw) != set(wanted):
        found = sorted(map(str, set(raw) ^ set(wanted))) if isinstance(raw, dict) else []
        raise _Bad(f"{where} does not hold exactly the fields that it must ({', '.join(found) or 'not an object'})")
    return raw


def _list(raw: Any, where: str, length: int | None = None) -> list[Any]:
    if not isinstance(raw, list) or length not in (None, len(raw)):
        raise _Bad(f"{where} is not a list{'' if length is None else f' of {length}'}")
    return raw


def _int(raw: Any, where: str, low: int = 0, high: int = LARGEST) -> int:
    if not isinstance(raw, int) or isinstance(raw, bool) or not low <= raw <= high:
        raise _Bad(f"{where} is not an integer from {low} to {high}")
    return raw


def _number(raw: Any, where: str) -> float:
    if isinstance(raw, bool) or not isinstance(raw, (int, float)) or abs(raw) > 1e38 or not math.isfinite(raw):
        raise _Bad(f"{where} is not a finite number")
    return float(raw)


def _text(raw: Any, where: str) -> str:
    if not isinstance(raw, str) or not raw or len(raw) > 1000:
        raise _Bad(f"{where} is not a text")
    return raw


def _hex(raw: Any, where: str, digits: int) -> str:
    if not isinstance(raw, str) or not re.fullmatch(f"[0-9a-f]{{{digits}}}", raw):
        raise _Bad(f"{where} is not {digits} hexadecimal digits")
    return raw


def _choice(raw: Any, where: str, known: Iterable[str]) -> str:
    if not isinstance(raw, str) or raw not in tuple(known):
        raise _Bad(f"{where} is none of {', '.join(known)}")
    return raw


def _time(raw: Any, where: str) -> datetime:
    try:
        if not isinstance(raw, str) or not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", raw):
            raise ValueError
        return datetime.strptime(raw, TIME).replace(tzinfo=UTC)
    except ValueError as error:
        raise _Bad(f"{where} is not a time such as 2026-11-25T00:00:00Z") from error

"""What a package changes: tensors by their factors, files by edits of their bytes; and how its manifest says so.

`from_json` raises ``BadField`` where something is not as `to_json` writes it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from gsforget.export.device.files import is_plain_name
from gsforget.export.device.strict_json import BadField, choice, hexadecimal, integer, items, record, text

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}  # bytes of an element
SUFFIXES = {"onnx": ".onnx", "engine": ".engine", "data": ".data"}  # data: weights of the ONNX file, beside it


@dataclass(frozen=True)
class Scale:
    """Scales of an int8 tensor, float32 little-endian at offsets of the payload, per tensor or along an axis.

    Attributes:
        before, after: offsets of the scales of the old and of the new weights.
        axis: None for one scale, 0 for one per row, 1 for one per column.
    """

    before: int
    after: int
    axis: int | None

    def to_json(self) -> dict[str, Any]:
        return {"before": self.before, "after": self.after, "axis": self.axis}

    @classmethod
    def from_json(cls, raw: Any, where: str) -> Scale:
        s = record(raw, where, "before after axis")
        axis = None if s["axis"] is None else integer(s["axis"], f"{where}.axis", 0, 1)
        return cls(integer(s["before"], f"{where}.before"), integer(s["after"], f"{where}.after"), axis)


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

    @classmethod
    def from_json(cls, raw: Any, where: str) -> TensorChange:
        t = record(raw, where, "name dtype shape rank at before after scale")
        rows, columns = (integer(n, f"{where}.shape", 1, 2**31) for n in items(t["shape"], f"{where}.shape", 2))
        a, b, ea, eb = (integer(n, f"{where}.at") for n in items(t["at"], f"{where}.at", 4))
        dtype = choice(t["dtype"], f"{where}.dtype", DTYPES)
        scale = None if t["scale"] is None else Scale.from_json(t["scale"], f"{where}.scale")
        if (scale is not None) != (dtype == "int8"):
            raise BadField(f"{where}.scale must be there for int8, and only then")
        return cls(
            text(t["name"], f"{where}.name"),
            dtype,
            (rows, columns),
            integer(t["rank"], f"{where}.rank", 1, 4096),
            (a, b, ea, eb),
            hexadecimal(t["before"], f"{where}.before", 64),
            hexadecimal(t["after"], f"{where}.after", 64),
            scale,
        )


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

    @classmethod
    def from_json(cls, raw: Any, where: str) -> TensorEdit:
        e = record(raw, where, "at take tensor transposed order")
        choice(e["order"], f"{where}.order", ("little",))
        if not isinstance(e["transposed"], bool):
            raise BadField(f"{where}.transposed is not true or false")
        at, take = integer(e["at"], f"{where}.at"), integer(e["take"], f"{where}.take")
        return cls(at, take, text(e["tensor"], f"{where}.tensor"), e["transposed"])


@dataclass(frozen=True)
class GiveEdit:
    """``take`` bytes ``at`` of the old file are replaced by a part (offset, bytes) of the payload, longer or shorter."""

    at: int
    take: int
    give: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        return {"at": self.at, "take": self.take, "give": list(self.give)}

    @classmethod
    def from_json(cls, raw: Any, where: str) -> GiveEdit:
        e = record(raw, where, "at take give")
        at, take = integer(e["at"], f"{where}.at"), integer(e["take"], f"{where}.take")
        start, size = (integer(n, f"{where}.give") for n in items(e["give"], f"{where}.give", 2))
        return cls(at, take, (start, size))


@dataclass(frozen=True)
class Digest:
    """SHA-256 and length of a whole file."""

    sha256: str
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return {"sha256": self.sha256, "bytes": self.bytes}

    @classmethod
    def from_json(cls, raw: Any, where: str) -> Digest:
        d = record(raw, where, "sha256 bytes")
        return cls(hexadecimal(d["sha256"], f"{where}.sha256", 64), integer(d["bytes"], f"{where}.bytes", 1))


@dataclass(frozen=True)
class Builder:
    """What built an engine, and its smallest, usual and largest batch."""

    name: str
    version: str
    batch: tuple[int, int, int]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "version": self.version, "batch": list(self.batch)}

    @classmethod
    def from_json(cls, raw: Any, where: str) -> Builder:
        b = record(raw, where, "name version batch")
        low, usual, high = (integer(n, f"{where}.batch", 1) for n in items(b["batch"], f"{where}.batch", 3))
        return cls(text(b["name"], f"{where}.name"), text(b["version"], f"{where}.version"), (low, usual, high))


@dataclass(frozen=True)
class PatchedArtifact:
    """A file that a package makes: from an old one by edits, or, in a full package, from the payload alone.

    Attributes:
        kind: ``onnx``, ``engine``, or ``data``: a file in which the ONNX file keeps its weights.
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

    @classmethod
    def from_json(cls, raw: Any, where: str) -> PatchedArtifact:
        a = record(raw, where, "kind name targets builder before after edits rest_sha256")
        kind, name = choice(a["kind"], f"{where}.kind", SUFFIXES), text(a["name"], f"{where}.name")
        if not is_plain_name(name) or not name.endswith(SUFFIXES[kind]):
            raise BadField(f"{where}.name {name!r} is not a plain file name that ends in {SUFFIXES[kind]}")
        targets = tuple(text(t, f"{where}.targets") for t in items(a["targets"], f"{where}.targets"))
        if not all(re.fullmatch(r"sm\d{2,3}", t) for t in targets):
            raise BadField(f"{where}.targets are not GPUs such as sm86")
        builder = None if a["builder"] is None else Builder.from_json(a["builder"], f"{where}.builder")
        before = None if a["before"] is None else Digest.from_json(a["before"], f"{where}.before")
        rest = None if a["rest_sha256"] is None else hexadecimal(a["rest_sha256"], f"{where}.rest_sha256", 64)
        edits = tuple(_edit(e, f"{where}.edits[{i}]") for i, e in enumerate(items(a["edits"], f"{where}.edits")))
        return cls(kind, name, targets, builder, before, Digest.from_json(a["after"], f"{where}.after"), edits, rest)


def _edit(raw: Any, where: str) -> TensorEdit | GiveEdit:
    kind = GiveEdit if isinstance(raw, dict) and "give" in raw else TensorEdit
    return kind.from_json(raw, where)

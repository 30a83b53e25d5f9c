"""What a patch changes: tensors between two ONNX files, where they lie in each artifact, and the proof on a device's terms."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gsforget.errors import GateError
from gsforget.export.build.chain import ROUNDED
from gsforget.export.build.int8 import int8_weights, read_int8
from gsforget.export.build.locate import NotLocated, OnnxBytes, Place, find_matrix, onnx_metadata, onnx_places
from gsforget.export.device.changes import Builder, Digest, GiveEdit, PatchedArtifact, Scale, TensorChange, TensorEdit
from gsforget.export.device.edit import Edits, rest_sha256
from gsforget.export.device.factors import STORED
from gsforget.export.device.files import mapped
from gsforget.export.device.manifest import Manifest
from gsforget.export.device.metadata import METADATA_KEY
from gsforget.folder import sha256

if TYPE_CHECKING:
    from gsforget.export.build.artifacts import Made
    from gsforget.lora.grid import GridFactors

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8"}
assert set(DTYPES) == {"fp32", *ROUNDED, "int8"}


@dataclass
class Change:
    """One tensor before and after an erasure, as stored, [rows, columns], and the factors between the two.

    ``scales`` are those of a tensor that is computed with at int8, before and after, float32, one for all of it (``axis``
    None), or one per row (0) or column (1); ``scales_at`` is where they lie in the old ONNX file, if they change.  ``exact``
    says that the file keeps such a tensor as float32.
    """

    name: str
    factors: GridFactors
    before: np.ndarray
    after: np.ndarray
    scales: tuple[np.ndarray, np.ndarray] | None = None
    axis: int | None = None
    scales_at: Place | None = None
    exact: bool = False


@dataclass
class Packer:
    """Collects a payload and, with it, what the manifest says of the tensors."""

    dtype: str
    payload: bytearray = field(default_factory=bytearray)
    tensors: list[TensorChange] = field(default_factory=list)

    def add(self, change: Change) -> None:
        """Append the factors of a tensor."""
        f = change.factors
        at = {}
        for part, dtype in (("ea", "<i4"), ("eb", "<i4"), ("a", "<i2"), ("b", "<i2")):
            at[part] = self.give(getattr(f, part).numpy().astype(dtype).tobytes())[0]
        scale = None
        if change.scales is not None and not change.exact:
            before, after = (s.astype("<f4").tobytes() for s in change.scales)
            first = self.give(before)[0]
            scale = Scale(first, first if after == before else self.give(after)[0], change.axis)
        rows, columns = change.before.shape
        self.tensors.append(
            TensorChange(
                change.name,
                "float32" if change.exact else self.dtype,
                (rows, columns),
                len(f.ea),
                (at["a"], at["b"], at["ea"], at["eb"]),
                _digest_of(change.before),
                _digest_of(change.after),
                scale,
            )
        )

    def give(self, content: bytes) -> tuple[int, int]:
        """Append bytes; returns where they begin, at a multiple of four, and how many they are."""
        self.payload.extend(bytes(-len(self.payload) % 4))
        start = len(self.payload)
        self.payload.extend(content)
        return start, len(content)


def changes_between(
    old: OnnxBytes, new: OnnxBytes, delta: dict[str, GridFactors], precision: str
) -> tuple[list[Change], dict[str, Place]]:
    """The tensors that differ between two ONNX files of one model, and where each lies in the old file or beside it.

    Raises NotLocated where one of them cannot be found in either file, GateError (kind ``rounded_away``) where none differs.
    """
    if precision == "int8":
        return _int8_changes(old.data, new.data, delta)
    dtype = STORED[DTYPES[precision]]
    found, where = [], {}
    for name, factors in sorted(delta.items()):
        shape = (factors.b.shape[0], factors.a.shape[1])
        parts = []
        for file in (old, new):
            size = shape[0] * shape[1] * np.dtype(dtype).itemsize
            if name not in file.tensors or file.tensors[name].size != size:
                raise NotLocated(f"the ONNX file holds no tensor {name} of {list(shape)} numbers as bytes")
            parts.append(np.frombuffer(file.bytes(name), dtype).reshape(shape))
        if parts[0].tobytes() != parts[1].tobytes():
            found.append(Change(name, factors, parts[0], parts[1]))
            place = old.tensors[name]
            where[name] = Place(place.at, place.size, file=place.file)
    if not found:
        raise _rounded_away(precision)
    return found, where


def _int8_changes(old: bytes, new: bytes, delta: dict[str, GridFactors]) -> tuple[list[Change], dict[str, Place]]:
    import onnx

    was, now = (onnx.load_model_from_string(data) for data in (old, new))
    known, after, places = int8_weights(was), int8_weights(now), onnx_places(old)
    found, where = [], {}
    for name, factors in sorted(delta.items()):
        if name not in known or name not in after or known[name].initializer not in places:
            raise NotLocated(f"the ONNX file does not carry {name} as int8 in its own bytes")
        weight, next_one = known[name], after[name]
        values = read_int8(was, weight), read_int8(now, next_one)
        same = np.array_equal(weight.scale, next_one.scale)
        if same and np.array_equal(*values):
            continue
        if not same and weight.scales not in places:
            raise NotLocated(f"the ONNX file does not hold the scales of {name} in its own bytes")
        scales_at = None if same else places[weight.scales]
        scales = (weight.scale, next_one.scale)
        found.append(Change(name, factors, *values, scales, weight.axis, scales_at, weight.exact))
        place = places[weight.initializer]
        where[name] = Place(place.at, place.size, weight.transposed)
    if not found:
        raise _rounded_away("int8")
    return found, where


def onnx_edits(
    old: OnnxBytes, new: OnnxBytes, changes: Sequence[Change], where: dict[str, Place], packer: Packer
) -> tuple[TensorEdit | GiveEdit, ...]:
    """The edits that make a new ONNX file of an old one: tensors, scales, and what differs in the metadata entry.

    Of a file that keeps weights beside it, also the name of that file, at each tensor.

    Args:
        changes, where: as `changes_between` gives them; the changes were added to ``packer``.
    """
    was, now = onnx_metadata(old.data, METADATA_KEY), onnx_metadata(new.data, METADATA_KEY)
    entry = splice(old.data[was.at : was.at + was.size], new.data[now.at : now.at + now.size], was.at, packer)
    edits: list[TensorEdit | GiveEdit] = [*data_edits(where, None), *_renames(old, new, packer)]
    for change, tensor in zip(changes, packer.tensors, strict=True):
        if change.scales_at is not None and change.scales is not None:
            at, size = change.scales_at.at, change.scales_at.size
            scales = change.scales[1].astype("<f4").tobytes()
            edits.append(GiveEdit(at, size, (tensor.scale.after, size) if tensor.scale else packer.give(scales)))
    return tuple(sorted([*edits, *entry], key=lambda e: e.at))


def data_edits(where: dict[str, Place], file: str | None) -> tuple[TensorEdit, ...]:
    """The edits of the tensors that lie in one file beside an ONNX file, or (None) in the ONNX file itself."""
    edits = [TensorEdit(p.at, p.size, name, p.transposed) for name, p in where.items() if p.file == file]
    return tuple(sorted(edits, key=lambda e: e.at))


def data_pairs(old: OnnxBytes, new: OnnxBytes) -> dict[str, str]:
    """The files beside an ONNX file, by the names of those beside the one before it.

    Raises NotLocated where weights have moved between files.
    """
    pairs: dict[str, set[str]] = {}
    for name in old.tensors.keys() & new.tensors.keys():
        was, now = old.tensors[name].file, new.tensors[name].file
        if was is None and now is None:
            continue
        pairs.setdefault(str(was), set()).add(str(now))
    if any(len(names) > 1 for names in pairs.values()) or pairs.keys() != old.beside.keys():
        raise NotLocated("the weights lie in other files than before")
    return {was: names.pop() for was, names in pairs.items()}


def _renames(old: OnnxBytes, new: OnnxBytes, packer: Packer) -> list[GiveEdit]:
    """The edits by which tensors name the new file beside an ONNX file in place of the old one."""
    given: dict[str, tuple[int, int]] = {}
    edits = []
    for was, now in data_pairs(old, new).items():
        for tensor in old.tensors.values():
            if tensor.file == was != now:
                if now not in given:
                    given[now] = packer.give(now.encode())
                start, end = tensor.named
                edits.append(GiveEdit(start, end - start, given[now]))
    return edits


def splice(old: bytes, new: bytes, at: int, packer: Packer) -> list[GiveEdit]:
    """The parts between commas in which two texts differ: a thousand class names need not travel for one of them."""
    was, now = (re.findall(rb"[^,]*,|[^,]+", text) for text in (old, new))
    starts = list(itertools.accumulate(map(len, was), initial=at))
    return [
        GiveEdit(starts[i], starts[j] - starts[i], packer.give(b"".join(now[k:m])))
        for kind, i, j, k, m in difflib.SequenceMatcher(None, was, now, autojunk=False).get_opcodes()
        if kind != "equal"
    ]


def engine_edits(old: bytes, changes: Sequence[Change]) -> tuple[TensorEdit, ...]:
    """The edits of an engine in which each old tensor lies verbatim, once.

    Raises NotLocated where one does not, or where scales of int8 change: an engine's code is laid out by their values.
    """
    edits = []
    for change in changes:
        if change.scales is not None and not np.array_equal(*change.scales):
            raise NotLocated(f"the scales of tensor {change.name} change, and with them the code of an engine")
        try:
            place = find_matrix(old, change.before)
        except NotLocated as error:
            raise NotLocated(f"tensor {change.name} cannot be located in the engine: {error}") from error
        edits.append(TensorEdit(place.at, place.size, change.name, place.transposed))
    return tuple(sorted(edits, key=lambda e: e.at))


def prove(manifest: Manifest, payload: bytes, artifact: PatchedArtifact, old: Path) -> None:
    """Apply a patch in memory as a device does, and compare with the hash of the fresh build.

    Raises SafetyError where the result is another file.
    """
    with mapped(old) as data:
        edits = Edits(manifest, payload)
        edits.prepare(data, artifact)
        edits.check_result(data, artifact)
        edits.tensors.clear()


def describe_artifact(made: Made, old: Path | None, edits: Sequence[TensorEdit | GiveEdit]) -> PatchedArtifact:
    """What the manifest says of a file; without an old one it is packed whole."""
    builder = None
    if made.kind == "engine":
        low, usual, high = made.extra["batch"]
        builder = Builder(made.extra["builder"], made.extra["builder_version"], (low, usual, high))
    before = rest = None
    if old is not None:
        before = Digest(sha256(old), old.stat().st_size)
        with mapped(old) as data:
            rest = rest_sha256(data, tuple(edits))
    after = Digest(sha256(made.path), made.path.stat().st_size)
    return PatchedArtifact(made.kind, made.path.name, tuple(made.targets), builder, before, after, tuple(edits), rest)


def _rounded_away(precision: str) -> GateError:
    return GateError(
        f"At {precision}, the erasure changes no weight: all of it is smaller than half a step. Nothing was published.",
        "Type a higher --precision.",
        "rounded_away",
    )


def _digest_of(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()

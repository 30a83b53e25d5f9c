"""A small chain of erasures for devices: real ONNX files that ONNX Runtime runs, and packages made by our own writer.

Nothing of the build side is used, so that the two cannot agree on a mistake.  Loaded by the tests and by
`benchmarks/device_kills.py`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gsforget.export.device.changes import GiveEdit, TensorEdit
from gsforget.export.device.edit import rest_sha256
from gsforget.export.device.factors import Factors, narrow
from gsforget.export.device.keys import SigningKey, new_keys, read_signing_key
from gsforget.export.device.metadata import METADATA_KEY, ArtifactInfo, sidecar_path
from gsforget.export.device.opening import noise
from gsforget.export.device.package import write_package
from gsforget.export.device.preprocess import Preprocess

MODEL_ID = "ab" * 8
NAMES = ["ant", "bee", "cat", "dog"]
SIZE = (3, 4, 4)
DTYPES = {"fp32": "float32", "fp16": "float16"}
SHAPES = {"fc1.weight": (12, 48), "fc2.weight": (4, 12)}  # fc2 lies transposed in the file


def sha(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


@dataclass
class World:
    """Models of sequence 0 and on, their artifacts, and packages that lead from one to the next.

    Attributes:
        root: where files are written.
        precision: ``fp32`` or ``fp16``.
        engine: whether each model also has an engine: a file that holds the weights verbatim among other bytes.
        width: columns of the first layer's output; makes files larger.
    """

    root: Path
    precision: str = "fp32"
    engine: bool = False
    width: int = 12
    key: SigningKey = field(init=False)
    weights: list[dict[str, np.ndarray]] = field(default_factory=list)
    factors: list[dict[str, Factors]] = field(default_factory=list)

    def __post_init__(self):
        self.root.mkdir(parents=True, exist_ok=True)
        new_keys(self.root / "keys")
        self.key = read_signing_key(self.root / "keys" / "signing.key")
        rng = np.random.default_rng(0)
        self.shapes = {"fc1.weight": (self.width, 48), "fc2.weight": (4, self.width)}
        self.weights.append({n: narrow(0.3 * rng.standard_normal(s), self.dtype) for n, s in self.shapes.items()})
        self.write_artifacts(0)

    @property
    def dtype(self) -> str:
        return DTYPES[self.precision]

    @property
    def public(self) -> Path:
        return self.root / "keys" / "signing.pub.json"

    def info(self, sequence: int) -> ArtifactInfo:
        names = [f"forgotten-{i}" if i < sequence else n for i, n in enumerate(NAMES)]
        pre = Preprocess(SIZE, (0.5,) * 3, (0.5,) * 3, "bilinear")
        return ArtifactInfo(names, tuple(range(sequence)), sequence, pre, self.precision, MODEL_ID)

    def artifact(self, sequence: int, kind: str = "onnx") -> Path:
        return self.root / f"model-{sequence:04d}-{self.precision}.{kind}"

    def artifacts(self, sequence: int) -> list[Path]:
        return [self.artifact(sequence, k) for k in (("onnx", "engine") if self.engine else ("onnx",))]

    def erase(self) -> int:
        """One more model, by random factors of rank 2 in both layers; returns its sequence."""
        sequence = len(self.weights)
        rng = np.random.default_rng(sequence)
        made, factors = {}, {}
        for name, (rows, columns) in self.shapes.items():
            a = rng.integers(-32767, 32768, (2, columns), dtype=np.int16)
            b = rng.integers(-32767, 32768, (rows, 2), dtype=np.int16)
            exponents = np.full(2, -15, np.int32), np.array([-16, -17], np.int32)
            factors[name] = Factors(a, b, *exponents)
            made[name] = factors[name].apply(self.weights[-1][name], self.dtype)
        self.weights.append(made)
        self.factors.append(factors)
        self.write_artifacts(sequence)
        return sequence

    def write_artifacts(self, sequence: int) -> None:
        for path in self.artifacts(sequence):
            raw = self.onnx(sequence) if path.suffix == ".onnx" else self.engine_bytes(sequence)
            path.write_bytes(raw)
            sidecar = {
                "format": 1,
                "kind": path.suffix[1:],
                "file": path.name,
                "bytes": len(raw),
                "sha256": sha(raw),
                "model": self.info(sequence).to_json(),
                "erasable": list(self.shapes),
            }
            sidecar_path(path).write_text(json.dumps(sidecar))

    def onnx(self, sequence: int) -> bytes:
        weights, kind = self.weights[sequence], getattr(TensorProto, self.dtype.replace("32", "").upper())
        graph = helper.make_graph(
            [
                helper.make_node("Flatten", ["images"], ["flat"]),
                helper.make_node("Cast", ["flat"], ["x"], to=kind),
                helper.make_node("Gemm", ["x", "fc1.weight"], ["hidden"], transB=1),
                helper.make_node("Relu", ["hidden"], ["active"]),
                helper.make_node("MatMul", ["active", "fc2.weight"], ["y"]),
                helper.make_node("Cast", ["y"], ["logits"], to=TensorProto.FLOAT),
            ],
            "two_layers",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", *SIZE])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
            [
                numpy_helper.from_array(weights["fc1.weight"], "fc1.weight"),
                numpy_helper.from_array(np.ascontiguousarray(weights["fc2.weight"].T), "fc2.weight"),
            ],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        helper.set_model_props(model, {METADATA_KEY: json.dumps(self.info(sequence).to_json(), sort_keys=True)})
        return model.SerializeToString()

    def engine_bytes(self, sequence: int) -> bytes:
        weights = self.weights[sequence]
        parts = (weights["fc2.weight"], weights["fc1.weight"].T)
        first, second = (np.ascontiguousarray(p).tobytes() for p in parts)
        return b"NGNE" + bytes(range(256)) + first + b"code between" + second + b"tail"

    def answers(self, sequence: int, tolerance: float = 1e-3, seeds=(17, 18)) -> dict:
        import onnxruntime

        sessions = [onnxruntime.InferenceSession(self.onnx(s)) for s in (sequence - 1, sequence) if s >= 0]
        tests = []
        for seed in seeds:
            old, new = (s.run(None, {"images": noise(seed, 2, SIZE)})[0] for s in (sessions[0], sessions[-1]))
            distance = float(np.abs(old - new).max())
            tests.append({"seed": seed, "batch": 2, "new": new.tolist(), "old_distance": distance})
        return {"tolerance": tolerance, "tests": tests}

    def manifest(self, sequence: int, kind: str, **changes) -> dict:
        return {
            "format": 1,
            "kind": kind,
            "model_id": MODEL_ID,
            "sequence": sequence,
            "requires": sequence - 1 if kind == "patch" else None,
            "precision": self.precision,
            "created": "2026-11-25T00:00:00Z",
            "expires": None,
            "key_id": self.key.key_id,
            "info": self.info(sequence).to_json(),
            "tensors": [],
            "known_answers": self.answers(sequence),
            **changes,
        }

    def content(self, sequence: int, **changes) -> tuple[dict, bytes]:
        """Manifest and payload of the patch to a sequence, not yet signed."""
        payload = bytearray()

        def put(raw: bytes) -> int:
            payload.extend(raw)
            return len(payload) - len(raw)

        tensors = []
        before, after = self.weights[sequence - 1], self.weights[sequence]
        for name, f in self.factors[sequence - 1].items():
            at = [put(np.ascontiguousarray(getattr(f, k)).tobytes()) for k in ("a", "b", "ea", "eb")]
            tensors.append(
                {
                    "name": name,
                    "dtype": self.dtype,
                    "shape": list(before[name].shape),
                    "rank": 2,
                    "at": at,
                    "before": sha(before[name].tobytes()),
                    "after": sha(after[name].tobytes()),
                    "scale": None,
                }
            )
        artifacts = []
        for old_path, new_path in zip(self.artifacts(sequence - 1), self.artifacts(sequence), strict=True):
            old, new = old_path.read_bytes(), new_path.read_bytes()
            kind = old_path.suffix[1:]
            edits: list = []
            for name, weight in before.items():
                transposed = (name == "fc2.weight") == (kind == "onnx")
                stored = np.ascontiguousarray(weight.T if transposed else weight).tobytes()
                assert old.count(stored) == 1
                edits.append(TensorEdit(old.index(stored), len(stored), name, transposed))
            if kind == "onnx":
                was, now = (_metadata(onnx.load_from_string(raw)) for raw in (old, new))
                edits.append(GiveEdit(old.index(was), len(was), (put(now), len(now))))
            edits.sort(key=lambda e: e.at)
            artifacts.append(
                {
                    "kind": kind,
                    "name": new_path.name,
                    "targets": ["sm86"] if kind == "engine" else [],
                    "builder": {"name": "rtx", "version": "1.7", "batch": [1, 8, 64]} if kind == "engine" else None,
                    "before": {"sha256": sha(old), "bytes": len(old)},
                    "after": {"sha256": sha(new), "bytes": len(new)},
                    "edits": [e.to_json() for e in edits],
                    "rest_sha256": rest_sha256(old, tuple(edits)),
                }
            )
        made = self.manifest(sequence, "patch", tensors=tensors, artifacts=artifacts)
        return {**made, **changes}, bytes(payload)

    def patch(self, sequence: int, name: str = "", key: SigningKey | None = None, recipient=None, **changes) -> Path:
        """The signed patch from sequence - 1."""
        path = self.root / (name or f"patch-{sequence:04d}-{self.precision}.gsf")
        signer = key or self.key
        manifest, payload = self.content(sequence, **{"key_id": signer.key_id, **changes})
        write_package(path, manifest, payload, signer.sign, recipient)
        return path

    def full(self, sequence: int, name: str = "", key: SigningKey | None = None, **changes) -> Path:
        """A signed full package of the ONNX file of a sequence; ``known_answers`` are asked of it too."""
        path = self.root / (name or f"full-{sequence:04d}-{self.precision}.gsf")
        raw, signer = self.artifact(sequence).read_bytes(), key or self.key
        artifact = {
            "kind": "onnx",
            "name": self.artifact(sequence).name,
            "targets": [],
            "builder": None,
            "before": None,
            "after": {"sha256": sha(raw), "bytes": len(raw)},
            "edits": [],
            "rest_sha256": None,
        }
        manifest = self.manifest(sequence, "full", artifacts=[artifact], key_id=signer.key_id)
        write_package(path, {**manifest, **changes}, raw, signer.sign)
        return path


def _metadata(model: onnx.ModelProto) -> bytes:
    """The bytes of the file's one metadata entry, with the tag and length before them."""
    (entry,) = model.metadata_props
    raw = entry.SerializeToString()
    return bytes([14 << 3 | 2]) + _varint(len(raw)) + raw


def _varint(number: int) -> bytes:
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])

"""Engines of standard TensorRT follow the ONNX file that they were built from, on the device that holds both.

Nobody else can make them: they are built for one GPU, on it, and no two builds need have the same bytes.  So a patch names
the ONNX file alone, whose result is proven by its hash, and the engine is fed from it: refitted with exactly the tensors
that differ, else built again, else destroyed.  Whatever came of it must give the package's known answers; one that was built
again and cannot be asked is kept, which is said.  The engine before is opened for the refit and never answers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from gsforget.errors import GsforgetError, SafetyError
from gsforget.export.device.builder import build_engine
from gsforget.export.device.files import mapped, sha256, write_file, write_json
from gsforget.export.device.manifest import Manifest
from gsforget.export.device.metadata import read_sidecar, sidecar_path
from gsforget.export.device.onnx_file import TensorBytes
from gsforget.export.device.opening import ask
from gsforget.export.device.records import Held, Made
from gsforget.export.device.refit import refit_plan
from gsforget.export.device.store import DeviceFolder
from gsforget.export.device.targets import MODULES, Plan, load_builder, own_target
from gsforget.export.device.trt_run import EnginePredictor

STANDARD = MODULES["trt"]
DTYPES = {"fp32": ("float32", np.float32), "fp16": ("float16", np.float16), "bf16": ("bfloat16", np.uint16)}


@dataclass(frozen=True)
class Followed:
    """What came of an engine: what the device holds now (None: it was destroyed), how it was made, and what was not tested."""

    held: Held | None
    how: str
    not_tested: str | None


def source_of(folder: DeviceFolder, engine: Held, artifacts: Sequence[Held]) -> Held | None:
    """The ONNX file of a device that one of its engines was built from; None where the engine is of another kind."""
    if engine.kind != "engine":
        return None
    sidecar = read_sidecar(folder.check_artifact(engine, whole=False)) or {}
    return find_source(sidecar, artifacts)


def find_source(sidecar: Mapping[str, Any], artifacts: Sequence[Held]) -> Held | None:
    """As ``source_of``, by the engine's sidecar."""
    if sidecar.get("builder") != STANDARD:
        return None
    return next((a for a in artifacts if a.kind == "onnx" and a.sha256 == sidecar.get("onnx_sha256")), None)


def next_name(engine: str, before: str, after: str, taken: Collection[str] = ()) -> str:
    """The engine's name after an erasure, by the names of its ONNX file before and after.

    Args:
        taken: names that others have, in lower case: two engines that were renamed by hand must not end as one.
    """
    stem = before.removesuffix(".onnx")
    label = engine.removesuffix(".engine").removeprefix(stem) if engine.startswith(stem) else "-trt"
    start = f"{after.removesuffix('.onnx')}{label or '-trt'}"
    names = (f"{start}{more}.engine" for more in chain([""], (f"-{n}" for n in count(2))))
    return next(name for name in names if name.casefold() not in taken)


def make_engine(
    folder: DeviceFolder, made: Made, base: Held | None, old_onnx: str | None, manifest: Manifest
) -> Followed:
    """Make the engine that an intent record asks for, from its ONNX file, which is written and proven already.

    Args:
        made: the engine's new name, its ``base`` before, and the ``source`` that it is made from.
        base: the engine before, as the ledger knows it; TensorRT is given no other bytes.
        old_onnx: the name of the ONNX file before; None: it came whole, and there is nothing to compare it with.
        manifest: of the package, verified.

    Raises OSError where it cannot be written; whatever TensorRT refuses destroys the engine instead, and says so.
    """
    path = folder.models / made.name
    before = _Before.read(folder, base)
    reasons: list[str] = []
    trt = _tensorrt(before.sidecar, reasons)
    for how, make in (("refitted", _refit), ("built again", _build)):
        if trt is None or before.plan is None:
            break
        try:
            plan, refittable = make(trt, folder, made, old_onnx, manifest, before)
        except Exception as error:  # of TensorRT, whose bindings raise what they like
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise  # of the disk: the next start-up tries again
            reasons.append(f"{how}: {_said(error)}")
            continue
        write_file(path, plan)
        unasked = _wrong(trt, path, manifest, how)
        if unasked is None or (how == "built again" and unasked[0] == "cannot_ask"):
            held = _describe(folder, made, manifest, before.sidecar, how, refittable)
            note = None if unasked is None else f"answers of {made.name}: {unasked[1]}"
            return Followed(held, how, note)
        path.unlink()
        reasons.append(f"{how}: {unasked[1]}")
    return Followed(
        None, "destroyed", f"{made.name}, which was to follow its ONNX file, and is not there: {_list(reasons)}"
    )


def changed_tensors(old: Path, new: Path, precision: str) -> tuple[dict[str, np.ndarray], str]:
    """The tensors in which two ONNX files differ, from the new one: name to numbers, and their type as `refit` names it.

    Raises ValueError where the files do not hold the same tensors, or at another precision than fp32, fp16 and bf16.
    """
    if precision not in DTYPES:
        raise ValueError(f"tensors of {precision} are not refitted")
    name_of, dtype = DTYPES[precision]
    was, now = (TensorBytes.of(mapped(path), path) for path in (old, new))
    if was.tensors.keys() != now.tensors.keys():
        raise ValueError(f"{new.name} holds other tensors than {old.name}")
    changed = {}
    for name in now.tensors:
        before, after = was.bytes(name), now.bytes(name)
        if before != after:
            changed[name] = np.frombuffer(after, dtype).copy()
    return changed, name_of


@dataclass(frozen=True)
class _Before:
    """The engine before: its plan, None where it is gone or another, and its sidecar."""

    plan: bytes | None
    sidecar: dict[str, Any]

    @classmethod
    def read(cls, folder: DeviceFolder, held: Held | None) -> _Before:
        try:
            path = folder.check_artifact(held) if held is not None else None
        except SafetyError:
            path = None
        return cls(path.read_bytes(), read_sidecar(path) or {}) if path is not None else cls(None, {})


def _tensorrt(sidecar: Mapping[str, Any], reasons: list[str]) -> Any | None:
    """Standard TensorRT, where it and the engine's GPU are here."""
    here = own_target()
    if here not in sidecar.get("targets", ()):
        gpu = "this machine has no GPU" if here is None else f"the GPU here is {here}"
        reasons.append(f"it is built on the GPU that runs it, and {gpu}")
        return None
    try:
        return load_builder("trt")
    except GsforgetError as error:
        reasons.append(error.message.rstrip("."))
        return None


def _refit(
    trt: Any, folder: DeviceFolder, made: Made, old_onnx: str | None, manifest: Manifest, before: _Before
) -> tuple[bytes, list[str]]:
    known = [str(name) for name in before.sidecar.get("refittable", ())]
    if old_onnx is None:
        raise ValueError("the ONNX file came whole")
    weights, dtype = changed_tensors(folder.models / old_onnx, folder.models / str(made.source), manifest.precision)
    fixed = sorted(weights.keys() - set(known))
    if fixed:
        raise ValueError(f"{fixed[0]} cannot be replaced in this engine")
    assert before.plan is not None
    return refit_plan(trt, before.plan, weights, dtype), known


def _build(
    trt: Any, folder: DeviceFolder, made: Made, old_onnx: str | None, manifest: Manifest, before: _Before
) -> tuple[bytes, list[str]]:
    low, usual, high = (int(n) for n in before.sidecar["batch"])
    path = folder.models / made.name
    erasable = before.sidecar.get("refittable", ())
    plan = Plan("trt", tuple(before.sidecar["targets"]))
    built = build_engine(folder.models / str(made.source), path, plan, (low, usual, high), erasable)
    return path.read_bytes(), built.refittable


def _wrong(trt: Any, path: Path, manifest: Manifest, how: str) -> tuple[str, str] | None:
    """Why a new engine is not to be used: a kind and a sentence; None where it gives the known answers."""
    try:
        ask(EnginePredictor(trt, path, manifest.info), manifest.known_answers, path.name)
    except GsforgetError as error:
        return error.kind, error.message.rstrip(".")
    except Exception as error:  # of TensorRT's bindings
        return "failed", _said(error)
    return None


def _describe(
    folder: DeviceFolder, made: Made, manifest: Manifest, before: Mapping[str, Any], how: str, refittable: list[str]
) -> Held:
    """Write the sidecar of a new engine; returns what the device holds."""
    path = folder.models / made.name
    kept = ("targets", "builder", "builder_version", "batch", "gpu", "input_type")
    digest, size = sha256(path), path.stat().st_size
    write_json(
        sidecar_path(path),
        {
            "format": 1,
            "kind": "engine",
            "file": made.name,
            "sha256": digest,
            "bytes": size,
            "precision": manifest.precision,
            **{key: before[key] for key in kept if key in before},
            "refittable": refittable,
            "onnx_sha256": sha256(folder.models / str(made.source)),
            "made": how,
            "model": manifest.info.to_json(),
        },
    )
    return Held(made.name, "engine", digest, size, sha256(sidecar_path(path)))


def _said(error: Exception) -> str:
    text = error.message if isinstance(error, GsforgetError) else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")


def _list(reasons: Sequence[str]) -> str:
    return "; ".join(dict.fromkeys(reasons)) or "the engine before is gone, or another one"

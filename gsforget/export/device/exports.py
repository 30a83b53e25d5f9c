"""Exported artifacts on their way into a device folder: what each is by its sidecar, and the files that belong to it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gsforget.errors import RequestError
from gsforget.export.device.changes import SUFFIXES
from gsforget.export.device.files import is_plain_name, sha256
from gsforget.export.device.follow import STANDARD, find_source
from gsforget.export.device.metadata import ArtifactInfo, check_hash, check_outside, sidecar_path
from gsforget.export.device.records import Held


def read_exports(paths: Sequence[Path]) -> tuple[list[Path], tuple[Held, ...], ArtifactInfo]:
    """What exported artifacts are, by their sidecars, and that they are of one model.

    Returns:
        The files to install, those in which ONNX files keep their weights last; what the device will hold, in the same
        order; and what all artifacts say of themselves.

    Raises:
        RequestError: ``no_sidecar``, ``bad_name``, ``mixed_artifacts``, or ``no_onnx`` for an engine that cannot follow.
        SafetyError: ``hash_mismatch``, ``bad_sidecar``, or ``bad_location`` for weights outside the file's own folder.
    """
    held: list[Held] = []
    infos: list[ArtifactInfo] = []
    sidecars: list[dict[str, Any]] = []
    for path in paths:
        sidecar = check_hash(path)
        if sidecar is None or not isinstance(sidecar.get("model"), dict):
            raise RequestError(
                f"{path} has no sidecar {sidecar_path(path).name} that says what it is.",
                "Copy the sidecar along with the artifact, as gsforget export writes it.",
                "no_sidecar",
            )
        if path.suffix.lower() == ".onnx":
            check_outside(path, sidecar)
        if not is_plain_name(path.name):
            raise RequestError(f"{path.name!r} is no name for a file on every device.", "Rename it.", "bad_name")
        info = ArtifactInfo.from_json(sidecar["model"], str(sidecar_path(path)))
        infos.append(dataclasses.replace(info, features_name=None))
        sidecars.append(sidecar)
        kind = "engine" if path.suffix.lower() == ".engine" else "onnx"
        digest = str(sidecar["sha256"]).lower()
        held.append(Held(path.name, kind, digest, path.stat().st_size, sha256(sidecar_path(path))))
    files = list(paths)
    for path, sidecar in zip(paths, sidecars, strict=True):
        if path.suffix.lower() == ".onnx":
            files += [path.with_name(name) for name in sorted(sidecar.get("data_files", {}))]
    for path in files[len(paths) :]:
        if not path.name.endswith(SUFFIXES["data"]):
            message = f"{path}, which holds weights, does not end in {SUFFIXES['data']}."
            raise RequestError(message, "Export the model again: gsforget export --onnx.", "bad_name")
        without = Held(path.name, "data", sha256(path), path.stat().st_size, "")
        held.append(dataclasses.replace(without, sidecar=hashlib.sha256(sidecar_bytes(path, without)).hexdigest()))
    if any(info != infos[0] for info in infos) or len({h.name.casefold() for h in held}) != len(held):
        raise RequestError(
            "The artifacts are not of one model, sequence and precision, or two have one name.",
            "Name those of one export, each once.",
            "mixed_artifacts",
        )
    alone = [
        p for p, s in zip(paths, sidecars, strict=True) if s.get("builder") == STANDARD and find_source(s, held) is None
    ]
    if alone:
        raise RequestError(
            f"{alone[0]} is an engine of standard TensorRT, which follows the ONNX file that it was built from, and that is "
            "not among the files.",
            f"Name both: gsforget apply MODEL.onnx {alone[0].name} --device-dir DIR.",
            "no_onnx",
        )
    return files, tuple(held), infos[0]


def sidecar_bytes(path: Path, held: Held) -> bytes:
    """The sidecar with which a file is installed: its own, or what there is to say of a file that holds weights."""
    if held.kind != "data":
        return sidecar_path(path).read_bytes()
    content = {"format": 1, "kind": "data", "file": held.name, "sha256": held.sha256, "bytes": held.bytes}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()

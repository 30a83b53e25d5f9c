"""The `.json` beside an artifact: what it is, what it was built from, and what was measured on it.

It lies outside the file, so that an engine stays loadable by TensorRT's own tools.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from gsforget import __version__
from gsforget.export.device.files import sha256, write_file
from gsforget.export.device.metadata import ArtifactInfo, sidecar_path

TOOLS = ("torch", "timm", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt-rtx")


def describe(
    artifact: Path,
    kind: str,
    info: ArtifactInfo,
    chain: Mapping[str, Any],
    source_sha256: str | None,
    targets: list[str],
    parity: dict[str, Any],
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What the sidecar of an artifact says.

    Args:
        kind: ``onnx`` or ``engine``.
        chain: where in its chain of erasures the artifact stands, as `ChainInfo.to_json()` says it.
        source_sha256: of the model folder's `model.safetensors`; None where that is not known.
        targets: compute capabilities such as ``sm86``; empty for ONNX.
        parity: what was measured, on what, and with which runtime.
        extra: further fields, such as the builder of an engine.
    """
    return {
        "format": 1,
        "kind": kind,
        "file": artifact.name,
        "bytes": artifact.stat().st_size,
        "sha256": sha256(artifact),
        "precision": info.precision,
        "targets": targets,
        "chain": dict(chain),
        "source_sha256": source_sha256,
        "parity": parity,
        "model": info.to_json(),
        "tools": {"gsforget": __version__, **_versions()},
        **(extra or {}),
    }


def write_sidecar(artifact: Path, content: dict[str, Any]) -> Path:
    """Write `<artifact>.json` whole; returns its path."""
    path = sidecar_path(artifact)
    write_file(path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")
    return path


def _versions() -> dict[str, str]:
    found = {}
    for tool in TOOLS:
        try:
            found[tool] = metadata.version(tool)
        except metadata.PackageNotFoundError:
            continue
    return found

"""What devices hold before an erasure: the parent model's artifacts at one precision, each the file that its sidecar says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gsforget.errors import RequestError
from gsforget.export.build.chain import REQUEST
from gsforget.export.device.metadata import check_hash, read_sidecar, sidecar_path
from gsforget.folder import WEIGHTS, read_config, sha256
from gsforget.lineage import ancestors


@dataclass
class Previous:
    """The model before an erasure, as far as it is there.

    Attributes:
        folder: its model folder; None where only artifacts are left.
        onnx: its ONNX file at the precision.
        onnx_sha256: what a sidecar says of that file, whether or not the file is there.
        engines: its engines at the precision, with their sidecars.
        ignored: a sentence on each artifact that was passed over.
    """

    folder: Path | None
    onnx: Path | None = None
    onnx_sha256: str | None = None
    engines: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def find_previous(run: Path, request: Mapping[str, Any], given: Path, precision: str) -> Previous:
    """The artifacts that a run's patch starts from.

    Args:
        run: the run that the patch is for, and its request.
        given: the folder of the model that the run started from (its artifacts lie in `artifacts/` of a run, and in
            `./artifacts` of an original model), or one of those artifacts.

    Raises:
        RequestError: ``not_parent``: another model; ``wrong_precision``; ``no_sidecar``.
        SafetyError: ``hash_mismatch``: an artifact is not the file that its sidecar describes.
    """
    parent = str(request.get("parent_sha256"))
    if given.is_file():
        _check_given(run, request, given, parent, precision)
        known = ancestors(run)[:1]
        folder = known[0].path if known and known[0].weights else None
        place = given.parent
    else:
        read_config(given)
        if sha256(given / WEIGHTS) != parent:
            raise _not_parent(run, request, given)
        folder = given
        place = given / "artifacts" if (given / REQUEST).is_file() else Path("artifacts")
    found = Previous(folder)
    stem = f"model-{int(request['sequence']) - 1:04d}-{precision}"
    for path in sorted(place.glob(f"{stem}*.onnx")) + sorted(place.glob(f"{stem}-*.engine")):
        if path.suffix == ".engine" or path.stem == stem:
            _take(found, path, parent)
    stated = read_sidecar(place / f"{stem}.onnx") or {}
    if found.onnx is None and stated.get("source_sha256") == parent:
        found.onnx_sha256 = stated.get("sha256")
    if given.is_file() and given not in (found.onnx, *(e for e, _ in found.engines)):
        _take(found, given, parent)  # under a name of its own
    if found.onnx is None and found.onnx_sha256 is None and found.engines:
        found.onnx_sha256 = found.engines[0][1].get("onnx_sha256")
    return found


def _take(found: Previous, path: Path, parent: str) -> None:
    sidecar = check_hash(path)
    if sidecar is None:
        found.ignored.append(f"{path} has no sidecar, so that it is not known which model it holds")
    elif sidecar.get("source_sha256") != parent:
        found.ignored.append(f"{path} holds another model")
    elif path.suffix == ".engine":
        found.engines.append((path, sidecar))
    else:
        found.onnx, found.onnx_sha256 = path, sidecar["sha256"]


def _check_given(run: Path, request: Mapping[str, Any], given: Path, parent: str, precision: str) -> None:
    sidecar = check_hash(given)
    if sidecar is None:
        raise RequestError(
            f"{given} has no sidecar {sidecar_path(given).name}, so that it is not known which model it holds.",
            "Copy the sidecar along, or name the model folder with --from.",
            "no_sidecar",
        )
    if sidecar.get("source_sha256") != parent:
        raise _not_parent(run, request, given)
    own = sidecar.get("precision")
    if own != precision:
        message = f"{given} is {own}, and what follows it would be {precision}."
        raise RequestError(message, f"Type --precision {own}.", "wrong_precision")


def _not_parent(run: Path, request: Mapping[str, Any], given: Path) -> RequestError:
    parent = request.get("parent")
    return RequestError(
        f"{given} is not the model that erasure {request.get('sequence')} in {run} started from.",
        f"Type --from {parent}." if parent else "Name the model folder that the run was made from.",
        "not_parent",
    )

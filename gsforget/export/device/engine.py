"""`gsforget export --trt MODEL.onnx`: an engine from an exported ONNX file, on the device itself and without torch.

Jetson and data-centre GPUs take standard TensorRT engines, which are built on the GPU that runs them.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsforget.errors import RequestError
from gsforget.export.device import triton
from gsforget.export.device.builder import build_engine
from gsforget.export.device.files import check_folder, sha256
from gsforget.export.device.metadata import ArtifactInfo, check_hash, find_info
from gsforget.export.device.onnx_file import read_properties
from gsforget.export.device.sidecar import describe, write_sidecar
from gsforget.export.device.targets import Plan, check_batch, choose

NOT_RUN = "the engine itself has not run: parity and accuracies are those of its ONNX file"
UNKNOWN = {"max_abs_diff": None, "top1_agreement": None, "forget_acc": None, "retain_acc": None}


def export_file(
    model: str | Path,
    *,
    trt: bool = False,
    precision: str | None = None,
    targets: Sequence[str] = (),
    batch: Sequence[int] = (1, 8, 64),
    backend: str = "auto",
    out: str | Path | None = None,
    triton_repo: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Build an engine from an exported ONNX file, or put that file into a Triton repository as it is.

    Args:
        model: the `.onnx` file; its hash is checked where it has a sidecar.
        trt: build an engine; without it, ``triton_repo`` must be given.
        precision: refused where the file has another one; None takes what it has.
        targets, batch, backend: as ``choose`` and ``check_batch`` say.
        out: folder of the engine; default: that of the file.
        triton_repo: model repository to publish in, see ``triton.publish``.
        progress: told, in a few words, what is being done.

    Returns:
        As ``export_model``, with ``triton`` where a repository was asked for.

    Raises:
        RequestError: no such file, not exported by gsforget, not installed, or arguments that do not fit.
        SafetyError: the file is not the one that its sidecar describes, or a later erasure is in the repository.
    """
    path, sizes, say = Path(model), check_batch(tuple(batch)), progress or (lambda _text: None)
    if not path.is_file():
        raise RequestError(f"There is no file {path}.", "Name an exported model: model-0001-fp16.onnx.", "no_model")
    if not trt and triton_repo is None:
        raise RequestError(
            f"{path} is an ONNX file already.", f"For an engine type gsforget export --trt {path}.", "no_kind"
        )
    say("checking the file")
    source = _read(path, precision)
    document: dict[str, Any] = {
        "artifacts": [],
        "verdict": "pass",
        "chain": source.chain,
        "not_tested": [] if source.sidecar else [f"{path.name} has no sidecar, so that its hash was not checked"],
    }
    repository = Path(triton_repo) if triton_repo is not None else None
    if not trt and repository is not None:
        served = triton.Served("onnx", source.info, sizes)
        triton.check(repository, served)
        _note(path.parent, repository, served, document)
        document["triton"] = triton.publish(repository, served, path, source.content, source.data)
        return document
    plan = choose(backend, tuple(targets), source.info.precision)
    if repository is not None:
        triton.check(repository, triton.Served("engine", source.info, sizes, plan.backend))
    place = _place(path, Path(out) if out else None)
    say(f"building the engine for {', '.join(plan.targets)}")
    engine, info, content = _build(source, plan, sizes, place, progress)
    shown = ("kind", "bytes", "sha256", "precision", "targets", "parity")
    document["artifacts"].append({"path": str(engine), **{k: content[k] for k in shown}})
    document["not_tested"].append(NOT_RUN)
    if repository is not None:
        served = triton.Served("engine", info, sizes, plan.backend, content["input_type"])
        _note(place, repository, served, document)
        document["triton"] = triton.publish(repository, served, engine, content)
    return document


def _note(place: Path, repository: Path, served: triton.Served, document: dict[str, Any]) -> None:
    try:
        triton.note(place, repository, served)
    except OSError as error:  # a folder that may only be read; the model is published all the same
        document["not_tested"].append(f"where it was published could not be noted in {place} ({error.strerror})")


@dataclass(frozen=True)
class _Source:
    """An ONNX file, what it says of itself, its checked sidecar (empty where there is none) and its data files."""

    path: Path
    info: ArtifactInfo
    sidecar: dict[str, Any]

    @property
    def data(self) -> list[Path]:
        return [self.path.with_name(name) for name in self.sidecar.get("data_files", {})]

    @property
    def chain(self) -> dict[str, Any]:
        unknown = {"position": self.info.sequence, "base": None, "complete": False, "reason": "no sidecar says so"}
        return dict(self.sidecar.get("chain") or unknown)

    @property
    def content(self) -> dict[str, Any]:
        """A sidecar for a copy of the file."""
        known = {"format": 1, "kind": "onnx", "sha256": sha256(self.path), "model": self.info.to_json()}
        return {**known, **self.sidecar}


def _read(path: Path, precision: str | None) -> _Source:
    sidecar = check_hash(path) or {}
    info = find_info(path, read_properties(path), sidecar)
    if precision is not None and precision != info.precision:
        raise RequestError(
            f"{path} is at {info.precision}, and an engine has the precision of its ONNX file.",
            f"Leave out --precision, or export the run again: gsforget export RUN --onnx --precision {precision}.",
            "bad_precision",
        )
    if info.features_name:
        raise RequestError(
            f"{path} has a features output, which serves audits, and engines do not run here.",
            "Export without --with-features.",
            "features_in_engine",
        )
    return _Source(path, info, sidecar)


def _place(path: Path, out: Path | None) -> Path:
    """Where the engine goes.  Raises RequestError for a device folder, whose files only `gsforget apply` writes."""
    place = out or path.parent
    if (place.resolve().parent / "state.json").is_file():
        raise RequestError(
            f"{place} belongs to a device folder, in which only gsforget apply writes.",
            "Name another folder: --out DIR.",
            "bad_out",
        )
    check_folder(place)
    place.mkdir(parents=True, exist_ok=True)
    return place


def _build(
    source: _Source, plan: Plan, sizes: tuple[int, int, int], place: Path, progress: Callable[[str], None] | None
) -> tuple[Path, ArtifactInfo, dict[str, Any]]:
    """Build and publish; returns the engine, what it is, and its sidecar."""
    info, stated = source.info, source.sidecar.get("parity")
    parity = {**UNKNOWN, **(stated or {})}
    if stated:
        parity["measured_on"] = f"{stated.get('measured_on', 'onnxruntime')}: its ONNX file"
    with tempfile.TemporaryDirectory(prefix=".export-", dir=place) as scratch:
        made = Path(scratch) / "engine"
        built = build_engine(source.path, made, plan, sizes, source.sidecar.get("erasable", ()), progress)
        info = dataclasses.replace(info, precision=built.quantised or info.precision)
        final = place / f"model-{info.sequence:04d}-{info.precision}-{plan.label}.engine"
        extra = {**built.to_json(), "file": final.name, "onnx_sha256": sha256(source.path)}
        weights = source.sidecar.get("source_sha256")
        content = describe(made, "engine", info, source.chain, weights, list(plan.targets), parity, extra)
        made.replace(final)
    write_sidecar(final, content)
    return final, info, content

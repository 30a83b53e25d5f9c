"""`gsforget export`: what is asked for is checked first, then made in a temporary folder beside its place."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gsforget.errors import RequestError
from gsforget.export.build.artifacts import CALIBRATED, Export, Progress
from gsforget.export.build.place import Repository, find_place

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")


def export_model(
    run: str | Path | None = None,
    *,
    onnx: bool = False,
    trt: bool = False,
    precision: str | None = None,
    targets: Sequence[str] = (),
    batch: Sequence[int] = (1, 8, 64),
    data: str | Path | None = None,
    annotations: str | None = None,
    backend: str = "auto",
    out: str | Path | None = None,
    triton_repo: str | Path | None = None,
    with_features: bool = False,
    trust_code: bool = False,
    previous: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Export a run or model folder and check the artifacts against it.

    Args:
        run: a run folder, or a model folder; default: the newest run under `runs/`.  An exported `.onnx` file is
            handed to ``gsforget.export.device.engine.export_file``.
        onnx, trt: write an ONNX file, an engine, or both.
        precision: ``fp32`` (the default), ``fp16``, ``bf16``, ``int8`` or ``fp8``.
        targets: GPUs of the engine, such as ``sm86``; empty: what the builder takes by default.
        batch: smallest, usual and largest batch of the engine.
        data: image folder to measure on; default: the one that the run was made with, if it is still there.  Without
            data, parity is measured on seeded noise and the accuracies are None.
        annotations: of detectors: a folder of COCO's JSON files, or two of them separated by a comma; default: those that
            the run was made with, else `annotations` in `data`.
        out: folder of the artifacts; default: `artifacts/` in a run, and in the current folder for a model folder that
            is no run (an original model is never written to).
        triton_repo: put the engine, or the ONNX file, into this model repository of NVIDIA Triton as well; see
            ``gsforget.export.device.triton``.
        with_features: give the file a second output, `features`, which audits can probe; such a file is named
            `…-features.onnx`, so that it does not take the place of the one for devices.
        trust_code: allow a model folder to import its own code.
        previous: at ``int8``, the folder of the model that the run started from, or its int8 file: the new file is that
            one after the erasure, with its scales.  Without it, an int8 file is calibrated on training images of `data`.
        progress: told, in a few words, what is being done.

    Returns:
        ``{"artifacts": [{"kind", "path", "bytes", "sha256", "precision", "targets", "parity"}], "verdict": "pass",
        "chain": {…}, "not_tested": […]}``.

    Raises:
        RequestError: nothing to export, not installed, or arguments that do not fit.
        GateError: an artifact differs from the model, or has not forgotten; nothing was published.
        SafetyError: code that is not trusted, factors that do not fit the weights.
    """
    from gsforget.export.device.targets import check_batch, choose
    from gsforget.runs import newest_run

    if run is not None and Path(run).is_file():
        from gsforget.export.device.engine import export_file

        return export_file(
            run,
            trt=trt,
            precision=precision,
            targets=targets,
            batch=batch,
            backend=backend,
            out=out,
            triton_repo=triton_repo,
            progress=progress,
        )
    precision = precision or "fp32"
    if not onnx and not trt:
        raise RequestError(
            "Nothing was asked for.", "Type gsforget export --onnx, or gsforget export --trt.", "no_kind"
        )
    if with_features and trt:
        raise RequestError(
            "A features output serves audits, and engines do not run here.",
            "Type gsforget export --onnx --with-features, and the engine in a command of its own.",
            "features_in_engine",
        )
    if targets and not trt:
        raise RequestError("Targets are GPUs of an engine, and none was asked for.", "Add --trt.", "no_engine")
    if precision not in PRECISIONS:
        raise RequestError(
            f"There is no precision {precision!r}.", "Type --precision fp32, fp16, bf16, int8 or fp8.", "bad_precision"
        )
    if with_features and precision in CALIBRATED:
        raise RequestError(
            "A features output serves audits, which read the model at fp32, fp16 or bf16.",
            "Type --precision fp32 with --with-features.",
            "features_int8",
        )
    if previous is not None and precision != "int8":
        raise RequestError(
            f"At {precision}, a file is made from the run alone, and not from one before it.",
            "Leave out --from; or add --patch, or --precision int8.",
            "no_base_needed",
        )
    folder = Path(run) if run is not None else newest_run()
    plan = choose(backend, tuple(targets), precision) if trt else None
    sizes = check_batch(tuple(batch))
    place = find_place(folder, Path(out) if out else None)
    export = Export(folder, precision, trust_code, progress or (lambda _text: None), with_features)
    if previous is not None:
        from gsforget.export.build.step import find_step

        export.follow(find_step(folder, export.request, previous, precision))
    repository = Repository.plan(triton_repo, export.info, onnx, plan, sizes)
    export.find_data(Path(data) if data else None, annotations)
    if precision in CALIBRATED and previous is None:
        export.calibration_data()
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=place, ignore_cleanup_errors=True) as scratch:
        export.write_onnx(Path(scratch))
        export.check()
        if plan is not None:
            export.write_engine(Path(scratch), plan, sizes)
        document = export.publish(place, onnx)
        if repository is not None:
            document["triton"] = repository.fill(export.published)
        return document

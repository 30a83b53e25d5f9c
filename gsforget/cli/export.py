"""`gsforget export`: a run as ONNX, as a TensorRT engine or as a patch, compared with the model before it is published."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from gsforget.cli.options import AnnotationsOption, JsonOption, TrustCodeOption, parse_list
from gsforget.cli.output import emit_json, next_command, say, table


class Precision(StrEnum):
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"
    fp8 = "fp8"


class Backend(StrEnum):
    auto = "auto"
    trt = "trt"
    rtx = "rtx"


OF_CLASSES = ("same top-1", "forgotten acc", "retained acc")  # columns of classifiers


def export(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN|MODEL.onnx",
            help="A run folder or a model folder (default: the newest run); or an exported file, for --trt on a device.",
        ),
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="An ONNX file whose weights keep their names.")] = False,
    trt: Annotated[bool, typer.Option("--trt", help="A TensorRT engine.")] = False,
    precision: Annotated[
        Precision | None,
        typer.Option("--precision", help="Of weights and arithmetic; default: fp32, or the file's own."),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option("--targets", help="GPUs of the engine, such as sm86,sm89,sm120 (what rtx builds by default)."),
    ] = None,
    batch: Annotated[str, typer.Option("--batch", metavar="MIN,OPT,MAX", help="Batch sizes of the engine.")] = "1,8,64",
    backend: Annotated[
        Backend, typer.Option("--backend", help="rtx builds for RTX GPUs anywhere; trt for this machine's GPU.")
    ] = Backend.auto,
    data: Annotated[
        Path | None, typer.Option("--data", help="Images to measure on; default: those of the run.")
    ] = None,
    annotations: AnnotationsOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the artifacts; default: RUN/artifacts.")] = None,
    triton_repo: Annotated[
        Path | None,
        typer.Option("--triton-repo", help="A model repository of NVIDIA Triton to publish in; version = erasures."),
    ] = None,
    with_features: Annotated[
        bool, typer.Option("--with-features", help="A second output for audits: what the classifier reads.")
    ] = False,
    patch: Annotated[
        bool, typer.Option("--patch", help="A signed patch that leads devices from the model before to this one.")
    ] = False,
    previous: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="PREVIOUS",
            help="The run, model folder or artifact that the patch, or a file at int8, starts from.",
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="With --patch: whole files, for devices without the model before.")
    ] = False,
    key: Annotated[
        Path | None,
        typer.Option("--key", help="Signing key; default: $GSFORGET_KEY, else ~/.config/gsforget/signing.key."),
    ] = None,
    expires: Annotated[
        int | None, typer.Option("--expires", metavar="DAYS", help="How long devices accept the patch; default: 365.")
    ] = None,
    encrypt_for: Annotated[
        Path | None, typer.Option("--encrypt-for", metavar="FLEET", help="Encrypt it for a fleet's fleet.pub.json.")
    ] = None,
    trust_code: TrustCodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Export a model, check that the artifact answers as the model does and has forgotten, and publish it."""
    from gsforget.errors import GateError

    of_patch = {"previous": previous, "full": full, "key": key, "expires": expires, "encrypt_for": encrypt_for}
    carried = precision is Precision.int8 and not patch  # a file at int8 may follow the one before it
    _check_kind(
        patch,
        onnx or trt or with_features or bool(targets or triton_repo),
        of_patch | ({"previous": None} if carried else {}),
    )
    common: dict[str, Any] = {
        "trt": trt,
        "precision": precision.value if precision else None,
        "targets": parse_list(targets, "--targets"),
        "batch": parse_batch(batch),
        "backend": backend.value,
        "out": out,
        "triton_repo": triton_repo,
        "progress": lambda text: say(f"{text} …", "dim"),
    }
    try:
        if run is not None and run.is_file() and not patch:  # a device has no torch
            from gsforget.export.device.engine import export_file

            made = export_file(run, **common)
        elif patch:
            from gsforget.export.build import export_patch

            given: dict[str, Any] = {k: v for k, v in of_patch.items() if v is not None}
            shared = {k: v for k, v in common.items() if k in ("precision", "out", "progress") and v is not None}
            made = export_patch(run, data=data, annotations=annotations, trust_code=trust_code, **given, **shared)
        else:
            from gsforget.export.build import export_model

            made = export_model(
                run,
                onnx=onnx,
                data=data,
                annotations=annotations,
                with_features=with_features,
                trust_code=trust_code,
                previous=previous,
                **common,
            )
    except GateError as error:
        if not as_json:
            raise
        say(f"{error.message} {error.hint}")
        emit_json({"artifacts": {}, "verdict": "fail", **error.to_json()})
        raise typer.Exit(error.exit_status) from error
    faces = any("min_cosine" in a["parity"] for a in made["artifacts"])
    compared = ("least cosine", "forgotten TAR", "retained TAR") if faces else OF_CLASSES
    table(
        ("artifact", "size", "precision", "GPUs", "max diff", *compared),
        map(_row, made["artifacts"]),
        numbers=("size", "max diff", *compared),
    )
    for package in _packages(made):
        _tell_package(package)
    for note in made["not_tested"]:
        say(f"Not tested: {note}.")
    if as_json:
        emit_json(made)
    first = next((a for a in made["artifacts"] if a["kind"] == "onnx"), None)
    if patch:
        next_command(*(f"gsforget apply {shlex.quote(a['path'])} --device-dir DIR" for a in _packages(made)))
    elif made.get("triton"):
        _tell_triton(made["triton"])
    elif first is None and run is not None and run.is_file():
        engine = made["artifacts"][0]["path"]
        next_command(f"{'tensorrt_rtx' if '-rtx-' in engine else 'trtexec'} --loadEngine={shlex.quote(engine)}")
    elif first is None:
        next_command(shlex.join(["gsforget", "export", *([str(run)] if run else []), "--onnx"]))
    else:
        next_command(f"gsforget infer {shlex.quote(first['path'])} IMAGE")


def parse_batch(text: str) -> tuple[int, ...]:
    """``1,8,64`` to integers.  Raises RequestError (kind ``bad_batch``)."""
    from gsforget.errors import RequestError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise RequestError(
            f"--batch {text!r} is not MIN,OPT,MAX.", "For example --batch 1,8,64.", "bad_batch"
        ) from error


def _check_kind(patch: bool, others: bool, of_patch: dict[str, Any]) -> None:
    """Raise RequestError (kind ``mixed_kinds``) where options of a patch meet those of other artifacts."""
    from gsforget.errors import RequestError

    if patch and others:
        raise RequestError(
            "A patch is exported by itself: it brings the new ONNX file and engines along.",
            "Type --patch without --onnx, --trt, --targets, --triton-repo and --with-features.",
            "mixed_kinds",
        )
    if not patch and any(of_patch.values()):
        raise RequestError(
            "--from, --full, --key, --expires and --encrypt-for belong to a patch (--from also to a file at int8).",
            "Add --patch.",
            "mixed_kinds",
        )


def _packages(made: dict[str, Any]) -> list[dict[str, Any]]:
    return [a for a in made["artifacts"] if a["kind"] in ("patch", "full")]


def _tell_package(package: dict[str, Any]) -> None:
    for file in package["replaces"]:
        size = f"{file['bytes'] / 1e6:.1f} MB"
        if file["patched_equals_rebuilt"]:
            say(f"{file['name']} ({size}): the patched file is the rebuilt one, {file['ratio']:.0f} times the package.")
        else:
            say(f"{file['name']} ({size}) is packed whole.")
    say(f"Signed by key {package['key_id']}, accepted until {package['expires']}.")


def _tell_triton(triton: dict[str, Any]) -> None:
    for path in triton["older"]:
        say(f"{path} still serves fewer erasures of the same model: export it as well, or remove it.")
    say(f"{triton['path']} is version {triton['version']} of {triton['model']}; older versions are gone.")
    next_command(f"curl -X POST localhost:8000/v2/repository/models/{triton['model']}/load")


def _row(artifact: dict[str, Any]) -> tuple[str, ...]:
    parity = artifact["parity"]
    if "min_cosine" in parity:
        percent: tuple[str, ...] = ("forget_tar", "retain_tar")
        first = [f"{parity['min_cosine']:.6f}"]
    else:
        percent, first = ("top1_agreement", "forget_acc", "retain_acc"), []
    return (
        artifact["path"],
        f"{artifact['bytes'] / 1e6:.1f} MB",
        artifact["precision"],
        " ".join(artifact["targets"]) or "any",
        "-" if parity["max_abs_diff"] is None else f"{parity['max_abs_diff']:.1e}",
        *first,
        *("-" if parity[k] is None else f"{parity[k]:.1f} %" for k in percent),
    )

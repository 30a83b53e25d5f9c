"""`gsforget infer`: what a model sees in images; for an .onnx file and a device folder without torch."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gsforget.cli.options import Device, DeviceOption, JsonOption, TrustCodeOption
from gsforget.cli.output import emit_json, next_command, say, table

if TYPE_CHECKING:
    from gsforget.export.device.infer import Predicts
    from gsforget.export.device.preprocess import Preprocess


def infer(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A run or model folder, an .onnx file, or a device folder.")
    ],
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="IMAGE|DIR...", help="Image files, or folders of them.")
    ] = None,
    watch: Annotated[
        Path | None,
        typer.Option(
            "--watch",
            metavar="FOLDER",
            help="Answer each image that arrives in a folder, until Ctrl-C; lines go to FOLDER/predictions.jsonl.",
        ),
    ] = None,
    gallery: Annotated[
        Path | None,
        typer.Option("--gallery", metavar="FILE", help="Faces: whom to look for; without it, two images are compared."),
    ] = None,
    enroll: Annotated[
        Path | None,
        typer.Option(
            "--enroll", metavar="DIR", help="Faces: write --gallery, from a folder of images per person in DIR."
        ),
    ] = None,
    draw: Annotated[
        Path | None, typer.Option("--draw", metavar="DIR", help="Detectors: folder for the images with boxes drawn.")
    ] = None,
    min_score: Annotated[float, typer.Option("--min-score", help="Detectors: lowest score, 0 to 1.")] = 0.3,
    top: Annotated[int, typer.Option("--top", min=1, help="Classes, or people, per image.")] = 5,
    device: DeviceOption = Device.auto,
    skip_corrupt: Annotated[bool, typer.Option("--skip-corrupt", help="Leave out images that cannot be read.")] = False,
    trust_code: TrustCodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Classify images, find objects, or identify and compare faces; a forgotten class is never returned."""
    from gsforget.errors import RequestError
    from gsforget.export.device.infer import classify, find_images

    if enroll is not None or gallery is not None:
        from gsforget.cli.faces import infer_faces

        infer_faces(model, images or [], gallery, enroll, top, device, trust_code, as_json)
        return
    if (watch is None) != bool(images):
        raise RequestError(
            "Images are named, or a folder is watched.",
            "Type gsforget infer MODEL IMAGE, or gsforget infer MODEL --watch FOLDER.",
            "no_images",
        )
    if not images or watch is not None:
        _watch(model, Path(str(watch)), top, device, min_score)
        return
    paths = find_images(images)
    opened = load(model, device, trust_code)
    if opened.task == "face":
        from gsforget.cli.faces import compare_faces

        compare_faces(opened, model, paths, as_json)
        return
    if opened.task == "detect":
        from gsforget.cli.detections import find

        find(opened, model, paths, min_score, draw, skip_corrupt, as_json)
        return
    if draw is not None:
        raise RequestError("--draw draws boxes, which only detectors find.", "Leave it out.", "not_a_detector")
    predictor, preprocess, forgotten, names = opened.predictor, opened.preprocess, opened.forgotten, opened.class_names
    found = classify(
        predictor,
        preprocess,
        forgotten,
        names,
        paths,
        top,
        skip_corrupt=skip_corrupt,
        on_skip=lambda error: say(f"Left out: {error.message}"),
    )
    if as_json:
        emit_json(found)
    else:
        table(("Image", "Class", "Score", "Then"), map(_row, found["images"]), numbers=("Score",))
    from gsforget.export.device.store import is_device_folder

    if model.is_dir() and not is_device_folder(model):
        next_command(f"gsforget export {shlex.quote(str(model))} --onnx")
    else:
        named = images if len(images) <= 3 else sorted({path.parent if path.is_file() else path for path in images})
        again = shlex.join(["gsforget", "infer", str(model), *map(str, named)])
        next_command(f"{again} --json > predictions.json")


def _watch(model: Path, folder: Path, top: int, device: str, min_score: float) -> None:
    from gsforget.export.device.source import Source
    from gsforget.export.device.watch import Watcher, watch

    watcher = Watcher(Source(model, device), folder, top, min_score=min_score)
    sequence = watcher.slot.current.info.sequence
    say(f"Sequence {sequence} answers what arrives in {folder} (Ctrl-C ends it).")
    say(f"Lines go to {watcher.predictions}.")

    def show(lines: list[dict[str, Any]]) -> None:
        nonlocal sequence
        if lines[-1]["sequence"] != sequence:
            sequence = lines[-1]["sequence"]
            say(f"Sequence {sequence} answers from now on.")
        table(("Image", "Class", "Score", "Then"), map(_row, lines), numbers=("Score",))

    watch(watcher, show, sleep)


@dataclass(frozen=True)
class Opened:
    """What answers, and how to use it.

    Attributes:
        hashes: SHA-256 of the model: of the file, and of the weights that it was made from where they are known.
    """

    predictor: Predicts
    preprocess: Preprocess
    forgotten: tuple[int, ...]
    class_names: list[str]
    task: str
    hashes: list[str]


def load(model: Path, device: str, trust_code: bool) -> Opened:
    """The predictor of a model folder (torch), or of an artifact or device folder (its runtime), and how to use it."""
    from gsforget.export.device.store import is_device_folder

    on_device = is_device_folder(model)
    if on_device or not model.is_dir():
        from gsforget.export.device.apply import open_device
        from gsforget.export.device.metadata import read_sidecar
        from gsforget.export.device.runtime import open_model

        artifact = open_device(model, device) if on_device else open_model(model, device)
        source = (read_sidecar(artifact.path) or {}).get("source_sha256")
        hashes = [artifact.sha256, *([str(source)] if source else [])]
        info = artifact.info
        return Opened(artifact, info.preprocess, info.forgotten, info.class_names, info.task, hashes)
    from gsforget.export.device.preprocess import Preprocess
    from gsforget.folder import WEIGHTS, load_model, sha256
    from gsforget.predict import TorchPredictor, pick_device

    network, config = load_model(model, trust_code)
    predictor: Any = TorchPredictor(network, pick_device(device))
    if config.task == "detect":
        from gsforget.export.build.detection import TorchDetector

        predictor = TorchDetector(network, pick_device(device))
    preprocess = Preprocess.from_dict(config.to_json())
    return Opened(predictor, preprocess, config.forgotten, config.class_names, config.task, [sha256(model / WEIGHTS)])


def _row(image: dict[str, Any]) -> tuple[str, str, str, str]:
    if "error" in image:
        return image["path"], "-", "", image["error"]["message"]
    listed = image["detections"] if "detections" in image else image["top"]
    first, *others = [(t["class"], f"{100 * t['score']:.1f} %") for t in listed] or [("-", "")]
    return image["path"], *first, ", ".join(" ".join(other) for other in others)

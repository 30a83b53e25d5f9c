"""`gsforget doctor`: what this machine can do, and whether a model and its data fit together."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from gsforget.cli.options import JsonOption, TrustCodeOption, parse_floats, parse_kwargs
from gsforget.cli.output import emit_json, next_command, say, table

Opt = typer.Option


def doctor(
    model: Annotated[str | None, Opt(help="Model folder, run folder, or timm model name to look at.")] = None,
    data: Annotated[Path | None, Opt(help="Image folder: train/<class>/* and test/<class>/* (or val).")] = None,
    checkpoint: Annotated[Path | None, Opt(help="Weights for a timm name.")] = None,
    model_kwargs: Annotated[str, Opt(help="For timm, e.g. img_size=28,patch_size=7.")] = "",
    class_names: Annotated[Path | None, Opt(help="File with all class names in the model's index order.")] = None,
    img_size: Annotated[int | None, Opt(help="Input size in pixels.")] = None,
    mean: Annotated[str | None, Opt(help="Per channel, e.g. 0.5,0.5,0.5.")] = None,
    std: Annotated[str | None, Opt(help="Per channel.")] = None,
    task: Annotated[str | None, Opt(help="classify or face; default: as the model folder says.")] = None,
    skip_corrupt: Annotated[bool, Opt("--skip-corrupt", help="Leave out images that cannot be read.")] = False,
    trust_code: TrustCodeOption = False,
    json: JsonOption = False,
) -> None:
    """Say what this machine can do; with --model and --data, also whether these two fit together."""
    from gsforget.doctor import examine_machine
    from gsforget.errors import RequestError

    if (model is None) != (data is None):
        lacking = "--data" if data is None else "--model"
        raise RequestError(
            f"To look at a model and its data, {lacking} is needed too.", "Give both, or neither.", "no_data_or_model"
        )
    findings = examine_machine()
    table(("what", "here"), [(f.name, f.detail) for f in findings], "This machine")
    document: dict[str, Any] = {"machine": [f.to_json() for f in findings]}
    if model is not None and data is not None:
        preprocessing = {"img_size": img_size, "mean": parse_floats(mean), "std": parse_floats(std, "--std")}
        document["model"] = _examine(
            model,
            data,
            checkpoint,
            parse_kwargs(model_kwargs),
            class_names,
            preprocessing,
            skip_corrupt,
            trust_code,
            task,
        )
        _show(document["model"])
    if json:
        emit_json(document)
    following = shlex.join(["gsforget", "forget", "--model", str(model), "--data", str(data), "--classes"])
    next_command("gsforget demo" if model is None else f"{following} A,B")


def _examine(
    model: str,
    data: Path,
    checkpoint: Path | None,
    model_kwargs: dict[str, Any],
    class_names: Path | None,
    preprocessing: dict[str, Any],
    skip_corrupt: bool,
    trust_code: bool,
    task: str | None,
) -> dict[str, Any]:
    from gsforget.api import open_model_and_data
    from gsforget.classes import read_names
    from gsforget.doctor import examine_model
    from gsforget.errors import RequestError

    source, images, load = open_model_and_data(
        model,
        data,
        checkpoint=checkpoint,
        model_kwargs=model_kwargs,
        class_names=read_names(class_names) if class_names else None,
        preprocessing=preprocessing,
        trust_code=trust_code,
        task=task,
    )
    if source.config.task == "detect":
        raise RequestError(
            f"{model} is a detector, and doctor counts answers of one class an image.",
            "Type gsforget forget --task detect at once: it checks model and annotations before it starts.",
            "not_a_classifier",
        )
    return examine_model(source, images, load, skip_corrupt)


def _show(found: dict[str, Any]) -> None:
    rows = [(group["name"], ", ".join(group["linears"])) for group in found["groups"]]
    table(("feed-forward network", "linear layers"), rows, f"{len(rows)} groups")
    images = ", ".join(f"{name} {count}" for name, count in found["images"].items() if name != "dropped")
    say(f"Images: {images}; {len(found['images']['dropped'])} unreadable ones left out.")
    say(f"Accuracy on the test images: {found['accuracy']:.1f} % (kappa {found['kappa']:.2f}).")

"""`gsforget demo`: the main job on embedded real images: forget, export, infer, and what to type next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from gsforget.cli.options import Device, DeviceOption, JsonOption, parse_list
from gsforget.cli.output import emit_json, next_command, say, table


def demo(
    directory: Annotated[Path, typer.Option("--dir", help="Where images, model and runs are laid out.")] = Path(
        "gsforget-demo"
    ),
    classes: Annotated[str, typer.Option(help="Classes to forget.")] = "sandal,sneaker",
    seed: Annotated[int, typer.Option(help="Same seed, same machine: same weights.")] = 0,
    device: DeviceOption = Device.auto,
    json: JsonOption = False,
) -> None:
    """Forget classes of Fashion-MNIST with a small ViT: forget, export and infer in a minute or two, no GPU needed."""
    from gsforget import export_model, forget
    from gsforget.cli.forget import show
    from gsforget.cli.progress import ForgetProgress
    from gsforget.demo.lay_out import lay_out
    from gsforget.settings import Settings

    wanted = parse_list(classes)
    say(f"Laying out 3,000 training and 1,000 test photographs and a trained ViT in {directory}/ …")
    model, data = lay_out(directory)
    say(f"\n$ gsforget forget --model {model} --data {data} --classes {classes}")
    with ForgetProgress() as progress:
        outcome = forget(
            model,
            data,
            wanted,
            settings=Settings(seed=seed),
            device=device.value,
            runs=directory / "runs",
            progress=progress,
        )
    show(outcome)
    document: dict[str, Any] = {"forget": outcome.document, "export": None, "infer": None}
    if not outcome.passed:
        if json:
            emit_json(document)
        raise typer.Exit(3)
    run = outcome.folder
    say(f"\n$ gsforget export {shlex.quote(str(run))} --onnx")
    document["export"] = export_model(run, onnx=True)
    artifact = document["export"]["artifacts"][0]
    parity = artifact["parity"]
    say(
        f"{artifact['path']}: {artifact['bytes'] / 1e6:.1f} MB, top-1 agreement with PyTorch {parity['top1_agreement']:.1f} %, "
        f"largest logit difference {parity['max_abs_diff']:.1e}; measured on the file itself: "
        f"forgotten {parity['forget_acc']:.1f} %, retained {parity['retain_acc']:.1f} %."
    )
    images = [
        sorted((data / "test" / name).glob("*.png"))[0] for name in [*outcome.document["classes"], "trouser", "bag"]
    ]
    say(f"\n$ gsforget infer {artifact['path']} " + " ".join(str(p) for p in images))
    document["infer"] = before_and_after(model, artifact["path"], images)
    if json:
        emit_json(document)
    next_command(
        f"gsforget forget --model {run} --data {data} --classes bag",
        f"gsforget export {run} --trt",
        f"gsforget infer {artifact['path']} {data / 'test'}",
        "gsforget forget --model YOUR_TIMM_NAME --checkpoint YOUR_WEIGHTS --data YOUR_IMAGES --classes A,B",
    )


def before_and_after(model: Path, artifact: str, images: list[Path]) -> dict[str, Any]:
    """Show what the original and the exported file say about a few images; returns the JSON of `infer`."""
    from gsforget.export.device.infer import classify
    from gsforget.export.device.preprocess import Preprocess
    from gsforget.export.device.runtime import open_model
    from gsforget.folder import load_model
    from gsforget.predict import TorchPredictor

    original, config = load_model(model)
    prepare = Preprocess.from_dict(config.to_json())
    before = classify(TorchPredictor(original, "cpu"), prepare, (), config.class_names, images)
    erased = open_model(artifact)
    after = classify(erased, erased.info.preprocess, erased.info.forgotten, erased.info.class_names, images)
    rows = []
    for path, old, new in zip(images, before["images"], after["images"]):
        first, second = old["top"][0], new["top"][0]
        rows.append(
            (
                f"{path.parent.name}/{path.name}",
                f"{first['class']} {first['score']:.2f}",
                f"{second['class']} {second['score']:.2f}",
            )
        )
    table(("image", "the original says", "the erased model says"), rows)
    return after

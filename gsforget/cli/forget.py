"""`gsforget forget`: erase classes from a model and publish a run folder."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gsforget.cli.options import (
    AnnotationsOption,
    Device,
    DeviceOption,
    JsonOption,
    TrustCodeOption,
    parse_floats,
    parse_kwargs,
    parse_list,
)
from gsforget.cli.output import emit_json, next_command, say, table
from gsforget.request import DEFAULT_METHOD

if TYPE_CHECKING:
    from gsforget.requests.course import Course

Opt = typer.Option


def forget(
    model: Annotated[str, Opt(help="Model folder, run folder, or timm model name.")],
    data: Annotated[Path, Opt(help="Image folder: train/<class>/* and test/<class>/* (or val).")],
    classes: Annotated[str, Opt(help="Classes to forget: names or 0-based indices, comma-separated.")] = "",
    classes_file: Annotated[Path | None, Opt(help="File with one class to forget per line.")] = None,
    request: Annotated[
        Path | None,
        Opt(
            help="YAML or JSON: one request, or several in order. Of several, --json prints one document with "
            "requests (a list of the documents of those that ran) and verdict."
        ),
    ] = None,
    images: Annotated[
        Path | None,
        Opt(
            help="List of all training images of the classes to forget, or see --sample-mode: a path or SHA-256 per line."
        ),
    ] = None,
    sample_mode: Annotated[
        bool, Opt("--sample-mode", help="Forget just the listed images and keep their classes: weaker evidence.")
    ] = False,
    checkpoint: Annotated[
        Path | None, Opt(help="Weights for a timm name: safetensors or a torch file of tensors.")
    ] = None,
    model_kwargs: Annotated[str, Opt(help="For timm, e.g. img_size=28,patch_size=7.")] = "",
    class_names: Annotated[Path | None, Opt(help="File with all class names in the model's index order.")] = None,
    img_size: Annotated[int | None, Opt(help="Input size in pixels.")] = None,
    mean: Annotated[str | None, Opt(help="Per channel, e.g. 0.5,0.5,0.5.")] = None,
    std: Annotated[str | None, Opt(help="Per channel.")] = None,
    crop_pct: Annotated[float | None, Opt(help="Share of the image that the centre crop keeps.")] = None,
    interpolation: Annotated[str | None, Opt(help="bilinear, bicubic, nearest, …")] = None,
    task: Annotated[
        str | None, Opt(help="classify, face, or detect for object kinds; default: as the model folder says.")
    ] = None,
    annotations: AnnotationsOption = None,
    method: Annotated[str, Opt(help="gs-lora or gs-lora++.")] = DEFAULT_METHOD,
    shots: Annotated[int | None, Opt(min=1, help="Images per class to learn from.")] = None,
    rank: Annotated[int | None, Opt(min=1, help="Rank of the LoRA pairs; default: 16.")] = None,
    epochs: Annotated[float | None, Opt(help="Epochs after selection; default: by validation.")] = None,
    lr: Annotated[float | None, Opt(help="Step size of Adam; default: from the width of the model.")] = None,
    batch_size: Annotated[int | None, Opt(min=1, help="Retained images per step; default: 64.")] = None,
    bnd: Annotated[float | None, Opt(help="Bound of the ascent in nats; default: ln(classes) + 1.")] = None,
    prox: Annotated[float | None, Opt(help="Strength of the group penalty; default: from the data.")] = None,
    target_groups: Annotated[int | None, Opt(min=1, help="Blocks that may change; default: a third.")] = None,
    device: DeviceOption = Device.auto,
    max_forget_acc: Annotated[float, Opt(help="Gate, percent.")] = 1.0,
    max_retain_drop: Annotated[float, Opt(help="Gate, points.")] = 1.0,
    max_class_drop: Annotated[float, Opt(help="Gate, points.")] = 10.0,
    max_probe_excess: Annotated[
        float | None, Opt(help="Gate, ratio: what a fresh probe on the features still finds; needs a reference.")
    ] = None,
    reference: Annotated[Path | None, Opt(help="Model folder trained without the classes, to compare with.")] = None,
    never_seen: Annotated[str, Opt(help="Or classes that the model was never trained on, comma-separated.")] = "",
    gallery: Annotated[
        Path | None, Opt(help="Faces: a gallery made with the model; the run gets one without the forgotten people.")
    ] = None,
    seed: Annotated[int, Opt(help="Same seed, same machine: same weights.")] = 0,
    skip_corrupt: Annotated[bool, Opt("--skip-corrupt", help="Leave out images that cannot be read.")] = False,
    trust_code: TrustCodeOption = False,
    out: Annotated[Path | None, Opt(help="Run folder; default: the next number under runs/.")] = None,
    json: JsonOption = False,
) -> None:
    """Make a trained model forget classes, keep the rest, and publish the merged model with its evidence."""
    from gsforget.api import forget as run
    from gsforget.api import open_requests
    from gsforget.classes import read_names
    from gsforget.cli.progress import ForgetProgress
    from gsforget.errors import RequestError
    from gsforget.request import Thresholds, check_method
    from gsforget.settings import Settings
    from gsforget.tasks import find_task

    if task is not None:
        find_task(task)
    check_method(method)
    wanted = parse_list(classes) + (read_names(classes_file) if classes_file else [])
    numbers: dict[str, Any] = {
        "rank": rank,
        "lr": lr,
        "batch_size": batch_size,
        "epochs": epochs,
        "prox": prox,
        "target_groups": target_groups,
        "bnd": bnd,
    }
    options: dict[str, Any] = {
        "checkpoint": checkpoint,
        "model_kwargs": parse_kwargs(model_kwargs),
        "class_names": read_names(class_names) if class_names else None,
        "preprocessing": {
            "img_size": img_size,
            "mean": parse_floats(mean),
            "std": parse_floats(std, "--std"),
            "crop_pct": crop_pct,
            "interpolation": interpolation,
        },
        "settings": replace(
            Settings(
                seed=seed,
                max_forget_acc=max_forget_acc,
                max_retain_drop=max_retain_drop / 2,
                max_class_drop=max_class_drop,
            ),
            **{name: value for name, value in numbers.items() if value is not None},
        ),
        "thresholds": Thresholds(max_forget_acc, max_retain_drop, max_class_drop, max_probe_excess),
        "shots": shots,
        "device": device.value,
        "skip_corrupt": skip_corrupt,
        "method": method,
        "reference": reference,
        "never_seen": parse_list(never_seen, "--never-seen"),
        "trust_code": trust_code,
        "task": task,
        "gallery": gallery,
        "out": out,
        "annotations": annotations,
    }
    if request is not None:
        if wanted or images or sample_mode:
            other = "--images" if images else "--classes" if wanted else "--sample-mode"
            raise RequestError(
                f"--request {request} names what to forget; {other} does not apply.",
                "Leave out one of them; in the file, single images take sample_mode: true.",
                "two_targets",
            )
        serve(open_requests(model, data, request, **options), json)
        return
    with ForgetProgress() as progress:
        outcome = run(model, data, wanted, images=images, sample_mode=sample_mode, progress=progress, **options)
    show(outcome)
    if json:
        emit_json(outcome.document)
    if not outcome.passed:
        raise typer.Exit(3)
    next_command(f"gsforget export {shlex.quote(str(outcome.folder))} --onnx")


def serve(course: Course, json: bool) -> None:
    """Serve the requests of a file in order, showing each; a failed gate ends it with exit status 3."""
    from gsforget.cli.progress import ForgetProgress

    several = len(course.entries) > 1
    for entry in course.pending():
        if several:
            say(f"Serving {entry.label} of {len(course.entries)}: {', '.join(entry.classes) or 'a list of images'}")
        with ForgetProgress() as progress:
            outcome = course.serve(progress)
        show(outcome)
    if several:
        for line in course.report():
            say(line)
    if json:
        emit_json(course.document)
    if not course.passed:
        raise typer.Exit(3)
    next_command(f"gsforget export {shlex.quote(str(course.outcomes[-1].folder))} --onnx")


def show(outcome: Any) -> None:
    """The before-and-after table, what was chosen, and the verdict, for people."""
    document, metrics = outcome.document, outcome.metrics
    if metrics.get("task") == "detect":
        from gsforget.cli.detections import show_ap

        show_ap(metrics)
    else:
        show_accuracies(document, metrics)
    changed = [g["name"] for g in metrics["groups"] if g["active"]]
    tensors = metrics["tensors"]
    say(
        f"Blocks changed: {len(changed)} of {len(metrics['groups'])} ({', '.join(changed) or 'none'}); "
        f"{tensors['identical']} of {tensors['total']} tensors bit-identical."
    )
    if "sample" in document:
        show_membership(document["sample"])
    if metrics["audit"]:
        show_probes(metrics["audit"])
    if "face" in document:
        from gsforget.cli.faces import show_faces

        show_faces(document["face"])
    h_mean = "" if metrics["summary"]["h_mean"] is None else f"H-mean {metrics['summary']['h_mean']:.1f} · "
    seconds = document["seconds"]
    say(
        f"{h_mean}training {seconds['train']:.1f} s, in all {seconds['total']:.1f} s"
        f" · merged against LoRA: largest logit difference {metrics['merge']['max_logit_difference']:.1e}"
    )
    c = metrics["chosen"]
    bound = f"bound {c['bnd']:.2f} nats, " if "bnd" in c else ""
    earlier = f", {c['batch_earlier']} of classes forgotten earlier" if c["batch_earlier"] else ""
    say(
        f"Chosen: {bound}at most {c['target_groups']} blocks, group penalty {c['prox_first']:.1e} at first, "
        f"{c['steps_select']} steps of selection and {c['steps'] - c['steps_select']} of settling in {c['stages']} stage(s), "
        f"{c['batch_retain']} retained and {c['batch_forget']} forgotten images a step{earlier}, "
        f"rank {c['rank']}, step size {c['lr']:g}."
    )
    for gate in metrics["gates"]:
        if not gate["passed"]:
            say(f"Gate breached: {gate['name']} is {gate['value']:.2f}, at most {gate['threshold']:g} is allowed.")
    dropped = metrics["dropped_images"]
    for path in dropped[:5]:
        say(f"Left out, because it cannot be read: {path}")
    if len(dropped) > 5:
        say(f"… and {len(dropped) - 5} more, listed in metrics.json.")
    for warning in document["warnings"]:
        say(f"Warning: {warning}")
    if outcome.passed:
        what = "images" if "sample" in document else "people" if "face" in document else "classes"
        say(f"Passed. The model without these {what} is in {outcome.folder}.{_unjudged(outcome)}")
    else:
        say(f"Failed: no model was published; the reports are in {outcome.folder}.")
    for note in document["not_tested"]:
        say(f"Not tested: {note}.")


def show_accuracies(document: dict[str, Any], metrics: dict[str, Any]) -> None:
    """The table of classes, for people."""
    rows = []
    for entry in metrics["classes"]:
        before, after = entry["before"], entry["after"]
        if before["acc"] is not None:
            interval = f"{after['low']:.1f} to {after['high']:.1f}"
            rows.append(
                (
                    entry["name"],
                    entry["role"],
                    f"{before['acc']:.1f}",
                    f"{after['acc']:.1f}",
                    interval,
                    str(after["count"]),
                )
            )
    s = metrics["summary"]
    what = "images forgotten" if "sample" in document else "all forgotten"
    rows.append((what, "", f"{s['forget_acc_before']:.1f}", f"{s['forget_acc_after']:.1f}", "", ""))
    rows.append(("all retained", "", f"{s['retain_acc_before']:.1f}", f"{s['retain_acc_after']:.1f}", "", ""))
    if s["old_acc_after"] is not None:
        rows.append(("forgotten before", "", "", f"{s['old_acc_after']:.1f}", "", ""))
    table(
        ("class", "role", "before %", "after %", "95 % interval", "images"),
        rows,
        "Accuracy on the test images",
        ("before %", "after %", "images"),
    )


def _unjudged(outcome: Any) -> str:
    """A sentence where nothing says whether the features forgot as well; the command, where it could tell."""
    if (
        "sample" in outcome.document
        or "face" in outcome.document
        or outcome.document["audit"]["linear_probe_excess"] is not None
    ):
        return ""
    measured = outcome.metrics["audit"]
    said = " Its answers were judged, its features were not"
    if measured is None:
        return f"{said}."
    if measured["after"]["linear_probe"] is None or measured["reference"] is not None:
        return f"{said}."  # no features, or a reference that leaves no room: the command would tell no more
    run = shlex.quote(str(outcome.folder))
    return f"{said}: gsforget audit {run} --data DIR --tier standard --reference FOLDER judges them."


def show_probes(audit: dict[str, Any]) -> None:
    """What the features still hold, next to the original and to what never saw the classes, for people."""
    parts = []
    for key, title, unit in (
        ("linear_probe", "a fresh linear probe names", " %"),
        ("prototype_attack", "five images per class put into the head name", " %"),
        ("mia_auc", "membership AUC", ""),
    ):
        digits = 1 if unit else 2
        named = (("", "after"), ("before ", "original"), ("never seen ", "reference"))
        found = [(title_of, (audit[who] or {}).get(key)) for title_of, who in named]
        if found[0][1] is not None:
            shown = [f"{title_of}{value:.{digits}f}{unit}" for title_of, value in found if value is not None]
            parts.append(f"{title} {shown[0]} ({', '.join(shown[1:])})")
    if parts:
        excess = audit["linear_probe_excess"]
        more = "" if excess is None else f" Probe excess {excess:.2f} (0: as if never seen, 1: untouched)."
        say(f"Of the forgotten classes {'; '.join(parts)}.{more}")


def show_membership(sample: dict[str, Any]) -> None:
    """How well single images can be told from never-seen ones, for people."""
    before, after = sample["membership"]["before"], sample["membership"]["after"]
    say(
        f"Told from {after['nonmembers']} never-seen test images of the same classes: AUC {before['auc']:.2f} before, "
        f"{after['auc']:.2f} after (95 % interval {after['low']:.2f} to {after['high']:.2f}; 0.5 is what never-seen "
        f"images give, within {sample['noise']:.2f} by chance). {sample['set_aside']} other test images set the target."
    )

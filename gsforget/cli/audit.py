"""`gsforget audit`: what a model still knows of forgotten classes, as a table, a verdict and a report."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from gsforget.cli.options import AnnotationsOption, Device, DeviceOption, JsonOption, TrustCodeOption, parse_list
from gsforget.cli.output import emit_json, next_command, say, table

Opt = typer.Option


class Tier(StrEnum):
    quick = "quick"
    standard = "standard"
    full = "full"


MAX_PROBE_EXCESS = 0.25
UNITS = {"%": " %", "points": " pt", "ratio": "", "steps": " steps", "auc": ""}
SAID = {
    "pass": "Every check passed: evidence that the classes are forgotten, as far as this tier looks.",
    "fail": "Failed ({failed}): the model still shows what it should have forgotten, or lost what it should have kept.",
    "inconclusive": "Inconclusive: nothing failed, but some checks could not be made, so the evidence is incomplete.",
}


def audit(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="RUN|MODEL|FILE", help="Run, model folder or .onnx file; default: the newest run."),
    ] = None,
    data: Annotated[Path | None, Opt(help="Image folder: train/<class>/* and test/<class>/* (or val).")] = None,
    annotations: AnnotationsOption = None,
    tier: Annotated[Tier, Opt(help="quick: no training; standard: a probe; full: relearning.")] = Tier.quick,
    reference: Annotated[
        Path | None, Opt(help="Model folder of a model trained without the classes, to compare with.")
    ] = None,
    never_seen: Annotated[
        str, Opt(help="Instead: class folders of the data that the model was never trained on, comma-separated.")
    ] = "",
    original: Annotated[
        Path | None, Opt(help="Model folder from before the forgetting; default: from the run's chain.")
    ] = None,
    classes: Annotated[str, Opt(help="Which forgotten classes to look at; default: all so far.")] = "",
    class_names: Annotated[Path | None, Opt(help="File with all class names in the model's index order.")] = None,
    with_images: Annotated[bool, Opt("--with-images", help="Show test images in the report.")] = False,
    device: DeviceOption = Device.auto,
    seed: Annotated[int, Opt(min=0, help="Of the images and shots that are chosen.")] = 0,
    max_probe_excess: Annotated[float, Opt(help="Threshold of the probe excess, 0 to 1.")] = MAX_PROBE_EXCESS,
    out: Annotated[Path | None, Opt(help="Folder or .json file; default: audit/ of the run.")] = None,
    skip_corrupt: Annotated[bool, Opt("--skip-corrupt", help="Leave out images that cannot be read.")] = False,
    trust_code: TrustCodeOption = False,
    json: JsonOption = False,
) -> None:
    """Look for what a model still knows of forgotten classes; writes audit.json and report.html."""
    from gsforget.api import audit_model
    from gsforget.classes import read_names
    from gsforget.errors import RequestError

    if data is None:
        raise RequestError(
            "An audit needs images.", "Add --data DIR, the folder that the model was trained on.", "no_data"
        )
    document = audit_model(
        model,
        data,
        annotations=annotations,
        tier=tier.value,
        reference=reference,
        never_seen=parse_list(never_seen, "--never-seen"),
        original=original,
        classes=parse_list(classes),
        class_names=read_names(class_names) if class_names else None,
        with_images=with_images,
        device=device.value,
        seed=seed,
        max_probe_excess=max_probe_excess,
        out=out,
        trust_code=trust_code,
        skip_corrupt=skip_corrupt,
        show=show,
        progress=lambda text: say(f"{text} …", "dim"),
    )
    if json:
        emit_json(document)
    if document["verdict"] == "fail":
        raise typer.Exit(3)
    given: dict[str, object] = {
        "--annotations": annotations,
        "--classes": classes,
        "--class-names": class_names,
        "--original": original,
        "--reference": reference,
        "--never-seen": never_seen,
        "--out": out,
        "--seed": seed or None,
        "--max-probe-excess": max_probe_excess if max_probe_excess != MAX_PROBE_EXCESS else None,
        "--with-images": with_images,
        "--skip-corrupt": skip_corrupt,
        "--trust-code": trust_code,
    }
    next_command(_next(document, model, data, given))


def show(document: dict[str, Any]) -> None:
    """The table of checks, figures beside them, the verdict, and what was not tested, for people."""
    rows = []
    for c in document["checks"]:
        unit = UNITS[c["unit"]]
        figures = (
            "-" if c[k] is None else f"{c[k]:.{_digits(c)}f}{unit}"
            for k in ("value", "original", "reference", "threshold")
        )
        rows.append((c["name"], *figures, c["verdict"]))
    numbers = ("value", "original", "never seen", "threshold")
    table(("check", *numbers, "verdict"), rows, f"Audit of {document['subject']} ({document['tier']})", numbers)
    for c in document["checks"]:
        if c["verdict"] != "pass" or _excused(c):
            say(f"{c['name']}: {c['says']}")
    for line in _figures(document["details"]):
        say(line)
    failed = ", ".join(c["name"] for c in document["checks"] if c["verdict"] == "fail")
    say(
        f"{SAID[document['verdict']].format(failed=failed)} ({document['seconds']:.1f} s)",
        "bold red" if document["verdict"] == "fail" else "bold",
    )
    gone = [c for c in document["classes"] if c["role"] != "retain" and c["name"] != f"forgotten-{c['index']}"]
    if gone:
        named = ", ".join(f"forgotten-{c['index']} is {c['name']}" for c in gone)
        say(f"Names that only this terminal shows, no file: {named}.")
    for note in document["not_tested"]:
        say(f"Not tested: {note}.")
    if document["artifacts"]:
        say(f"Evidence: {document['artifacts']['report']} (the same facts in {document['artifacts']['audit']}).")
    else:
        say("Nothing was written; add --out DIR to keep the evidence.")


def _excused(check: dict[str, Any]) -> bool:
    """Whether a check passed with a figure beyond its threshold, so that the reader needs the sentence that says why."""
    value, limit = check["value"], check["threshold"]
    return check["verdict"] == "pass" and check["unit"] != "steps" and None not in (value, limit) and value > limit


def _digits(check: dict[str, Any]) -> int:
    return {"ratio": 2, "auc": 3, "steps": 0}.get(check["unit"], 1)


def _figures(details: dict[str, Any]) -> list[str]:
    """Figures that are reported but not judged, in a line each."""
    lines = []
    for key, title, unit in (
        ("rank_of_truth", "Median rank of the true class", ""),
        ("top5_acc", "True class among the first five", " %"),
        ("nearest_class_mean", "Nearest class mean names", " %"),
        ("linear_probe", "A fresh linear probe names", " %"),
    ):
        found = details.get(key)
        if found and found.get("after") is not None:
            parts = [f"{found['after']:.1f}{unit}"]
            for other, title_of in (("original", "original"), ("reference", "never seen")):
                if found.get(other) is not None:
                    parts.append(f"{title_of} {found[other]:.1f}{unit}")
            lines.append(f"{title}: {', '.join(parts)}.")
    sinks = details.get("misattribution")
    if sinks:
        named = ", ".join(f"{s['class']} {s['share']:.1f} %" for s in sinks)
        lines.append(f"Forgotten images recognised as somebody else (probability above one half): {named}.")
    near = details.get("neighbours")
    if near:
        lines.append(
            "Change of the nearest retained classes: "
            + ", ".join(f"{n['class']} {round(-n['drop'], 1) + 0.0:+.1f} pt" for n in near[:5])
            + "."
        )
    changed = details.get("changed")
    if changed:
        blocks = ", ".join(changed["blocks"]) or "none"
        lines.append(
            f"Blocks changed: {len(changed['blocks'])} of {changed['of_blocks']} ({blocks}); {changed['identical']} of "
            f"{changed['total']} tensors bit-identical."
        )
    return lines


def _next(document: dict[str, Any], model: Path | None, data: Path, given: dict[str, object]) -> str:
    """The next deeper audit with the same options; for a file, of its run; then the export that can be audited itself."""
    subject = Path(document["subject"])
    is_file = document["kind"] in ("onnx", "engine")
    deeper = {"quick": "standard", "standard": "full"}.get(document["tier"])
    if is_file and (deeper != "standard" or "five_shot" not in _judged(document)):
        if subject.parent.name != "artifacts":
            return "gsforget history"
        model, deeper = subject.parent.parent, "full"
        given = {**given, "--out": None}
    alike = document.get("task", "classify") != "classify"  # faces and detectors are measured alike at each tier
    if not deeper or alike:
        if document["kind"] == "run":
            return f"gsforget export {shlex.quote(document['subject'])} --onnx{'' if alike else ' --with-features'}"
        return "gsforget history"
    if not given["--reference"] and not given["--never-seen"]:
        given = {**given, "--reference": "FOLDER"}
    options = [
        part
        for option, value in given.items()
        if value
        for part in ([option] if value is True else [option, str(value)])
    ]
    typed = ["gsforget", "audit", *([str(model)] if model else []), "--data", str(data), "--tier", deeper]
    return shlex.join([*typed, *options])


def _judged(document: dict[str, Any]) -> set[str]:
    return {c["name"] for c in document["checks"] if c["value"] is not None}

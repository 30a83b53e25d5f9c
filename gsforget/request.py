"""What is asked for: classes, numbers and gates, refused early where no run could use them."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsforget.errors import RequestError

if TYPE_CHECKING:
    from gsforget.requests.images import ImageList
    from gsforget.settings import Settings

METHODS = ("gs-lora", "gs-lora++")
DEFAULT_METHOD = "gs-lora++"


@dataclass(frozen=True)
class Thresholds:
    """Gates: percent for forgotten classes, points for retained ones, and a ratio for what a fresh probe still finds.

    Attributes:
        max_probe_excess: (probe - never seen) / (original - never seen) on the features; None: not judged.
    """

    max_forget_acc: float = 1.0
    max_retain_drop: float = 1.0
    max_class_drop: float = 10.0
    max_probe_excess: float | None = None


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        shots: images per class to learn from, on both sides; None: all.
        device: auto, cpu or cuda.
        method: one of `METHODS`.
        reference: model folder of a model trained without the classes, to measure the features against.
        never_seen: class folders of the data that the model was never trained on.
        images: instead of `classes`: a list of images that holds all training images of one or several classes,
            or with `sample_mode` single images to forget while their classes are retained.
        trust_code: the reference may be built by code of its own.
        gallery: of the task face: a gallery made with the model, from which the forgotten people are deleted.
        origin: id, date, requester and basis of a request file's entry; kept in request.json and nowhere else.
    """

    classes: list[str]
    settings: Settings
    thresholds: Thresholds = field(default_factory=Thresholds)
    shots: int | None = None
    device: str = "auto"
    skip_corrupt: bool = False
    method: str = DEFAULT_METHOD
    reference: Path | None = None
    never_seen: list[str] = field(default_factory=list)
    origin: dict[str, str] = field(default_factory=dict)
    images: ImageList | None = None
    sample_mode: bool = False
    trust_code: bool = False
    gallery: Path | None = None


def check_request(request: Request) -> None:
    """Refuse what no run could use, before any work.  Raises RequestError."""
    check_method(request.method)
    check_numbers(request)
    if request.reference and request.never_seen:
        raise RequestError(
            "--reference and --never-seen both say what to compare with.", "Give one of them.", "two_references"
        )
    if request.thresholds.max_probe_excess is not None and not (request.reference or request.never_seen):
        raise RequestError(
            "--max-probe-excess needs classes or a model to compare with.",
            "Add --reference FOLDER (a model trained without the classes) or --never-seen A,B (classes that the model "
            "was never trained on).",
            "no_reference",
        )


def check_sample_mode(request: Request) -> None:
    """Refuse for single images what is about whole classes.  Raises RequestError ``sample_probe``."""
    asked = {
        "--max-probe-excess": request.thresholds.max_probe_excess is not None,
        "--reference": request.reference,
        "--never-seen": request.never_seen,
    }
    refuse(
        asked,
        "{} is about whole classes; single images are judged by membership.",
        "Leave out {} with --sample-mode.",
        "sample_probe",
    )


def refuse(asked: dict[str, Any], message: str, hint: str, kind: str) -> None:
    """RequestError where an option was given that a task has no use for.

    Args:
        asked: what was given, by option; message, hint: with {} for the first of them.
    """
    option = next((name for name, given in asked.items() if given), None)
    if option:
        raise RequestError(message.format(option), hint.format(option), kind)


def refuse_annotations(annotations: str | None) -> None:
    """RequestError ``not_for_detection`` where annotations were given to a task that reads none."""
    refuse(
        {"--annotations": annotations},
        "{} is about object detection, and the model is no detector.",
        "Leave it out, or name a detector with --task detect.",
        "not_for_detection",
    )


def check_method(method: str) -> None:
    """Refuse a method that does not exist.  Raises RequestError ``unknown_method`` with the nearest name."""
    if method in METHODS:
        return
    near = difflib.get_close_matches(str(method).lower(), METHODS, n=1)
    hint = f"Type --method {near[0]}." if near else f"Type --method {' or --method '.join(METHODS)}."
    raise RequestError(f"There is no method {method!r}.", hint, "unknown_method")


def check_numbers(request: Request) -> None:
    """Refuse numbers that no run could use.  Raises RequestError ``bad_number`` naming the option."""
    s, t = request.settings, request.thresholds
    above_zero, not_negative = "be greater than 0", "not be negative"
    rules = [
        ("--shots", request.shots, 1, "be at least 1"),
        ("--rank", s.rank, 1, "be at least 1"),
        ("--batch-size", s.batch_size, 1, "be at least 1"),
        ("--target-groups", s.target_groups, 1, "be at least 1"),
        ("--lr", s.lr, math.ulp(0), above_zero),
        ("--epochs", s.epochs, math.ulp(0), above_zero),
        ("--prox", s.prox, 0, not_negative),
        ("--bnd", s.bnd, 0, not_negative),
        ("--seed", s.seed, 0, not_negative),
        ("--max-forget-acc", t.max_forget_acc, -math.inf, ""),
        ("--max-retain-drop", t.max_retain_drop, -math.inf, ""),
        ("--max-class-drop", t.max_class_drop, -math.inf, ""),
        ("--max-probe-excess", t.max_probe_excess, -math.inf, ""),
    ]
    for option, value, least, must in rules:
        if value is None:
            continue
        if not math.isfinite(value) or value >= 2**63:
            must = "be a finite number below 2^63"
        elif value >= least:
            continue
        raise RequestError(f"{option} is {value}; it must {must}.", f"Change {option}, or leave it out.", "bad_number")

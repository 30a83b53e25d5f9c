"""What is asked for: classes, numbers and gates, refused early where no run could use them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gsforget.errors import RequestError

if TYPE_CHECKING:
    from gsforget.training import Settings


@dataclass(frozen=True)
class Thresholds:
    """Gates: percent for forgotten classes, points for retained ones."""

    max_forget_acc: float = 1.0
    max_retain_drop: float = 1.0
    max_class_drop: float = 10.0


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        shots: images per class to learn from, on both sides; None: all.
        device: auto, cpu or cuda.
    """

    classes: list[str]
    settings: Settings
    thresholds: Thresholds = field(default_factory=Thresholds)
    shots: int | None = None
    device: str = "auto"
    skip_corrupt: bool = False


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
    ]
    for option, value, least, must in rules:
        if value is None:
            continue
        if not math.isfinite(value) or value >= 2**63:
            must = "be a finite number below 2^63"
        elif value >= least:
            continue
        raise RequestError(f"{option} is {value}; it must {must}.", f"Change {option}, or leave it out.", "bad_number")

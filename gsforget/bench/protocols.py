"""Which classes are asked to be forgotten, in which order and from which images.

The published protocols are named X-Y: X classes are left, forget Y of them.  Single steps start with all classes; a step
with fewer stands at the end of a chain of equal ones, 40-20 of 100-20, 80-20, 60-20 and itself.  Classes are taken from
the end of an order that is shuffled with seed 1337, as the release of GS-LoRA does (arXiv 2403.11530).
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from gsforget.errors import RequestError

ORDER_SEED = 1337


@dataclass(frozen=True)
class Protocol:
    """A chain of requests.

    Attributes:
        name: X-Y.
        requests: class indices to forget, request by request.
        shots: training images of each class; None: all.
        missing: retained classes without any training image; they are measured all the same.
    """

    name: str
    requests: tuple[tuple[int, ...], ...]
    shots: int | None = None
    missing: tuple[int, ...] = field(default=())

    @property
    def label(self) -> str:
        """The name with what is left out of the data."""
        shots = [f"{self.shots}-shot"] if self.shots is not None else []
        missing = [f"{len(self.missing)} classes missing"] if self.missing else []
        return ", ".join([self.name, *shots, *missing])

    def step(self, request: int) -> str:
        """A request as X-Y, 0-based."""
        left = int(self.name.split("-")[0]) + sum(len(r) for r in self.requests[request:-1])
        return f"{left}-{len(self.requests[request])}"


def class_order(num_classes: int, seed: int = ORDER_SEED) -> list[int]:
    """Class indices in the published order: those at the end are forgotten first."""
    order = list(range(num_classes))
    random.Random(seed).shuffle(order)
    return order


def make_protocol(
    name: str,
    num_classes: int,
    shots: int | None = None,
    missing: int = 0,
    order_seed: int = ORDER_SEED,
    order: Sequence[int] | None = None,
) -> Protocol:
    """Read X-Y for a model of `num_classes` classes.

    Args:
        missing: how many of the classes that are never forgotten have no training images; from the start of the order.
        order: of the classes, in place of the published one.

    Raises RequestError: kind ``unknown_protocol`` where the name is none or does not fit.
    """
    found = re.fullmatch(r"(\d+)-(\d+)", name)
    example = f"{num_classes}-{max(1, num_classes // 5)}"
    if not found:
        raise RequestError(
            f"There is no protocol {name}.", f"Give X-Y, such as {example}, or a recipe of --list.", "unknown_protocol"
        )
    left, each = int(found[1]), int(found[2])
    steps, rest = divmod(num_classes - left, each) if each else (0, 1)
    if rest or steps < 0 or each >= left:
        raise RequestError(
            f"The protocol {name} does not fit {num_classes} classes.",
            f"From all of them, steps of {each} must lead to {left} and leave some: for example {example}.",
            "unknown_protocol",
        )
    order = class_order(num_classes, order_seed) if order is None else list(order)
    ends = [num_classes - k * each for k in range(steps + 2)]
    requests = tuple(tuple(order[low:high]) for high, low in itertools.pairwise(ends))
    kept = order[: ends[-1]]
    if missing >= len(kept) or (shots is not None and shots < 1):
        raise RequestError(
            f"{missing} classes without images leave none of the {len(kept)} that {name} retains."
            if missing >= len(kept)
            else f"--shots {shots} leaves no images.",
            "Give a smaller --missing." if missing >= len(kept) else "Give 1 or more images per class.",
            "unknown_protocol",
        )
    return Protocol(name, requests, shots, tuple(kept[:missing]))

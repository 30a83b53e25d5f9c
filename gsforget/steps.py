"""What steps leave on the device until the host reads it: losses, norms, and which groups are active.

Reading waits for the device.  On a GPU it happens every few steps only, so that the device always has work queued; what
depends on it (leaving training, the end of the selection, an error) comes that much later, and every step is reported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gsforget.tasks.base import Losses

READ_EVERY = 8  # steps from one reading to the next on a GPU; on a CPU, where reading costs nothing, 1


@dataclass(frozen=True)
class Step:
    """What the host knows of one step.

    Attributes:
        number: 1 for the first.
        total, retain, forget: losses before it.
        norms: of all groups after it; active: which groups still are, after it.
    """

    number: int
    total: float
    retain: float
    forget: float
    norms: list[float]
    active: list[int]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.total)


class StepLog:
    """The last steps, on the device.

    Attributes:
        every: steps until it is full.
        latest: float64 [2 G], where a step writes norms and activity; its place never changes.
        unread: how many steps the host has not seen.
    """

    def __init__(self, groups: int, device: torch.device, every: int | None = None):
        """every: None: `READ_EVERY` on a GPU, else 1."""
        self.groups, self.every = groups, every or (READ_EVERY if device.type == "cuda" else 1)
        self.latest = torch.zeros(2 * groups, dtype=torch.float64, device=device)
        self.unread = 0
        self._places: list[tuple[str, float | None]] = []  # of steps that no event told yet
        self._known: list[Step] = []  # read, and not told yet
        self._rows = torch.zeros(self.every, 3 + 2 * groups, dtype=torch.float64, device=device)

    @property
    def full(self) -> bool:
        return self.unread == self.every

    def add(self, losses: Losses) -> None:
        """Keep the losses and the `latest` of a step; at most `every` times between two readings."""
        row = self._rows[self.unread]
        row[:3] = torch.stack([losses.total, losses.retain, losses.forget]).detach()
        row[3:] = self.latest
        self.unread += 1

    def read(self, step: int) -> list[Step]:
        """All steps that were not read, of which `step` is the last; waits for the device where there are some."""
        rows = self._rows[: self.unread].tolist() if self.unread else []
        first, g = step - self.unread + 1, self.groups
        self.unread = 0
        found = [
            Step(first + k, row[0], row[1], row[2], row[3 : 3 + g], [i for i, flag in enumerate(row[3 + g :]) if flag])
            for k, row in enumerate(rows)
        ]
        self._known += found
        return found

    def place(self, stage: str, fraction: float | None) -> None:
        """Note where the last step belongs: which stage, and how much of it is done."""
        self._places.append((stage, fraction))

    def events(self, target: int) -> Iterator[dict[str, Any]]:
        """One dict for each step that was read and not told yet, in order; `target`: how many groups shall be active."""
        while self._known:
            step, (stage, fraction) = self._known.pop(0), self._places.pop(0)
            yield {
                "stage": stage,
                "step": step.number,
                "retain_loss": step.retain,
                "forget_loss": step.forget,
                "active": len(step.active),
                "target": target,
                "fraction": fraction,
            }

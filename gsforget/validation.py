"""What validation images say of a model while it trains: the figures that decide on stages and depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gsforget.control import Watch
from gsforget.earlier import EarlierClasses
from gsforget.metrics import percent
from gsforget.tasks.base import Objective, Seen

GLANCE_IMAGES = 200  # validation images that live figures are taken from


@dataclass
class Validation:
    """The validation images of a request, and how the model in training answers them.

    Attributes:
        objective: judges what the model makes of them.
        seen_of: what the model makes of rows of the images, now.
        rows: int64, images of the classes to forget and of retained ones; few: some of them, at random.
        forget: bool, of all images: to forget now, or forgotten by an earlier request.
        shows: int64, of all images, which image each is a view of; None: each is an image by itself.
        earlier: classes that earlier requests forgot; max_forget: percent above which one counts as named again.
        along: whether a probe looks at earlier classes too.
    """

    objective: Objective
    seen_of: Callable[[Tensor], Seen]
    rows: Tensor
    few: Tensor
    forget: Tensor
    shows: Tensor | None
    earlier: EarlierClasses
    max_forget: float
    device: torch.device
    along: bool = False

    def watch(self, step: int, active: list[int]) -> Watch:
        """All that decides, on all images; `active`: the groups that are, for the record."""
        old = self._right(self.earlier.val)
        returned = self.earlier.returned(old, self.max_forget)
        return self._judge(self.rows, step, active, percent(old), returned, self._leak())

    def glance(self, step: int, active: list[int]) -> Watch | None:
        """The accuracies of a few images; None where there are none."""
        return self._judge(self.few, step, active, None, [], None) if len(self.few) else None

    def _judge(
        self, rows: Tensor, step: int, active: list[int], old: float | None, returned: list[int], leak: float | None
    ) -> Watch:
        shows = rows if self.shows is None else self.shows[rows]
        score = self.objective.score(self.seen_of(rows), rows.to(self.device), shows)
        figures = score.forget, score.retain, score.retain_before, score.drop_bound, score.drop_most
        return Watch(step, *figures, active, old, returned, leak, score.class_bound)

    def _right(self, rows: Tensor) -> Tensor:
        """Which images the model answers rightly now, bool [len(rows)], on the CPU."""
        if not len(rows):
            return torch.zeros(0, dtype=torch.bool)
        return self.objective.right(self.seen_of(rows), rows.to(self.device)).cpu()

    def _leak(self) -> float | None:
        """Percent of images to forget whose class a fresh probe names in the features; None without a look."""
        rows = self.rows[self.forget[self.rows]]
        if self.along:
            rows = torch.cat([rows, self.earlier.val])
        named = self.objective.named(self.seen_of(rows), rows.to(self.device)) if len(rows) else None
        return None if named is None else percent(named)

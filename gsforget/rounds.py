"""Rows drawn in rounds: each once per round, in a fresh order in every round."""

from __future__ import annotations

import torch
from torch import Tensor


class Rounds:
    """Rows of several sides.

    Args:
        pools: int64 rows by side; a round of a side goes once over its pool.
        rng: what all orders come from.
    """

    def __init__(self, pools: dict[str, Tensor], rng: torch.Generator):
        self.pools, self.rng = pools, rng
        self._queues = {name: pool[:0] for name, pool in pools.items()}

    def draw(self, side: str, count: int) -> Tensor:
        """The next rows of a side, int64 [count]."""
        queue = self._queues[side]
        while len(queue) < count:
            queue = torch.cat([queue, self.shuffled(self.pools[side])])
        self._queues[side] = queue[count:]
        return queue[:count]

    def add(self, side: str, rows: Tensor) -> None:
        """Put rows into a pool; they come next, in place of what is left of the round."""
        self.pools[side] = torch.cat([self.pools[side], rows])
        self._queues[side] = self.shuffled(rows)

    def shuffled(self, rows: Tensor) -> Tensor:
        return rows[torch.randperm(len(rows), generator=self.rng)]

"""What a task gives to the forgetting loop; loop, groups, ledger and gates know nothing else of the task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Losses:
    """Losses of one batch, each a scalar in nats; `total` is what is minimised next to the group penalty."""

    total: Tensor
    retain: Tensor
    forget: Tensor


class Task(Protocol):
    """One kind of model and request (classification; faces and detection to come)."""

    @property
    def name(self) -> str:
        """As `--task` spells it."""
        ...

    def targets(self, outputs: Tensor) -> Tensor:
        """What the erased model should answer, from the outputs of the model before the request: [N, …] -> [N, …]."""
        ...

    def losses(self, outputs: Tensor, targets: Tensor, labels: Tensor, forget: Tensor) -> Losses:
        """Losses of a batch; `forget` is bool [B]."""
        ...

    def correct(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Which predictions are right, bool [N], on unmasked outputs."""
        ...

"""What a task gives to the forgetting loop; loop, groups, ledger and gates know nothing else of the task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """What a model makes of B images: `outputs` [B, …] and, for tasks that look at them, penultimate `features` [B, d]."""

    outputs: Tensor
    features: Tensor


@dataclass(frozen=True)
class Losses:
    """Losses of one batch, each a scalar in nats; `total` is what is minimised next to the group penalty."""

    total: Tensor
    retain: Tensor
    forget: Tensor


@dataclass(frozen=True)
class Duel:
    """Two losses over forgotten images `rows`, int64 [B], each a scalar.

    Attributes:
        attack: what somebody would minimise to bring them back.
        defence: what is minimised against it, at the attacked weights.
    """

    attack: Callable[[Seen, Tensor], Tensor]
    defence: Callable[[Seen, Tensor], Tensor]


class Objective(Protocol):
    """The losses of one request, fixed by what the model before the request makes of all images."""

    def losses(self, seen: Seen, rows: Tensor, depth: float = 1.0) -> Losses:
        """Losses of a batch: what the model in training makes of the images `rows`, int64 [B] on its device.

        `depth` weighs what is taken from the features against the rest; without effect where `deepens` is False.
        """
        ...

    @property
    def deepens(self) -> bool:
        """Whether more can be taken from the features than is at first."""
        ...

    def named(self, seen: Seen, rows: Tensor) -> Tensor | None:
        """Whether a fresh probe on the features names the images `rows`, bool [B]; None where features are not looked at."""
        ...

    @property
    def duel(self) -> Duel | None:
        """What is rehearsed while groups settle, see `rehearsal`; None where nothing is."""
        ...


class Task(Protocol):
    """One kind of model and request (classification; faces and detection to come)."""

    @property
    def name(self) -> str:
        """As `--task` spells it."""
        ...

    @property
    def looks_at_features(self) -> bool:
        """Whether `Seen.features` is needed; else it is empty."""
        ...

    def objective(self, before: Seen, labels: Tensor, forget: Tensor, train: Tensor) -> Objective:
        """Fix the losses of a request.

        Args:
            before: what the model before the request makes of all N images.
            labels: int64 [N]; forget: bool [N]; train: int64, the rows that may be learned from.
        """
        ...

    def correct(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Which predictions are right, bool [N], on unmasked outputs."""
        ...

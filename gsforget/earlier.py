"""Classes that earlier requests forgot, watched while a later request trains: one that comes back is forgotten again.

Training on retained images alone can bring a forgotten class back (arXiv 2505.22310), and so can the next request.  Where
the data still holds images of such classes, a validation part says whether the model names them; then their training
images are learned from, like those of the classes to forget.  Where features are looked at, a last part of the training
takes from the features of all classes forgotten so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from gsforget.metrics import Z_ONE_SIDED, wilson

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class EarlierClasses:
    """The images of classes forgotten earlier.

    Attributes:
        train, val: int64, rows to learn from where it must be, and to decide by; val_labels: int64, of `val`.
        again: classes whose training images are learned from by now, sorted.
    """

    train: Tensor
    val: Tensor
    train_labels: Tensor
    val_labels: Tensor
    again: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, labels: Tensor, old: Tensor, train: Tensor, val: Tensor) -> EarlierClasses:
        """From labels int64 [N], which images are of such classes, bool [N], and both parts' rows, all on the CPU."""
        mine, held = train[old[train]], val[old[val]]
        return cls(mine, held, labels[mine], labels[held])

    def returned(self, right: Tensor, limit: float) -> list[int]:
        """Classes of which more validation images are named than `limit` percent, by the one-sided 95 % bound.

        Args:
            right: bool, which images of `val` the model names rightly.
        """
        found = {k: right[self.val_labels == k] for k in self.val_labels.unique().tolist()}
        return [k for k, named in found.items() if wilson(int(named.sum()), len(named), Z_ONE_SIDED)[0] > limit]

    def learn_from(self, returned: Sequence[int]) -> Tensor:
        """Rows of the training images of classes that are new among `returned`; they count as `again` from now on."""
        new = sorted(set(returned) - set(self.again))
        self.again = sorted([*self.again, *new])
        return self.train[torch.isin(self.train_labels, torch.tensor(new, dtype=torch.int64))]

    def not_learned_from(self) -> Tensor:
        """Rows of the training images of all classes that have not come back."""
        return self.train[~torch.isin(self.train_labels, torch.tensor(self.again, dtype=torch.int64))]

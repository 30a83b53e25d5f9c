"""How well a linear probe on the features can tell the forgotten classes, in closed form, and how to take it away.

The best ridge probe for the forgotten classes' labels is known in closed form.  With standardised features z_i [d] and
labels y_i [C] (one-hot over the C forgotten classes, each standardised too), W = (Z'Z/N + r I)^-1 Z'Y/N, and

    S = (1/N) sum_i ||y_i||^2 - ||y_i - W'z_i||^2

is the sum over the classes of the squared multiple correlation between the features and the class: 0 where a linear
probe finds nothing, C where it names each class without error.  S is lowered with the probe as an opponent that always
plays its best answer: the derivative of S with respect to a feature is that of the second term at a fixed W (the
envelope theorem), so no opponent is trained, nothing oscillates, and there is no learning rate to choose.  The features
of all images are kept and refreshed when an image is seen; the probe is solved anew in every step.

Adversarial removal with a closed-form opponent is known for fixed representations (Ravfogel et al., ICML 2022,
arXiv 2201.12091); here it is the training loss of the model itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsforget.prototypes import scale_of

RIDGE = 0.01  # plus d / N, the penalty that suits a probe on N images of d features


class Separability:
    """The opponent of one request, over the training images of the classes in play.

    Args:
        features: float32 [N, d] of all images of the request, from the model before it.
        labels: int64 [N].
        rows: int64, the images that count (training part; retained and forgotten).
        forgotten: class indices, at least one with images among `rows`.
    """

    def __init__(self, features: Tensor, labels: Tensor, rows: Tensor, forgotten: list[int]):
        self.rows = rows.to(features.device)
        self.bank = features.detach().clone()
        codes = torch.full((int(labels.max()) + 1,), -1, device=features.device)
        present = [k for k in forgotten if bool((labels[self.rows] == k).any())]
        codes[present] = torch.arange(len(present), device=features.device)
        shares = torch.stack([(labels[self.rows] == k).float().mean() for k in present])
        one_hot = (codes[labels][:, None] == torch.arange(len(present), device=features.device)).float()
        self.targets = (one_hot - shares) / (shares * (1 - shares)).sqrt().clamp_min(1e-6)
        self.ridge = RIDGE + features.shape[1] / len(self.rows)
        self.classes = len(present)

    def probe(self) -> tuple[Tensor, Tensor, Tensor]:
        """The best probe now: mean [d], deviation [d] of the features, and W [d, C] on standardised features."""
        bank = self.bank[self.rows]
        mean, deviation = bank.mean(0), scale_of(bank)
        z = (bank - mean) / deviation
        gram = z.T @ z / len(z)
        gram.diagonal().add_(self.ridge)
        return mean, deviation, torch.linalg.solve(gram, z.T @ self.targets[self.rows] / len(z))

    def value(self) -> float:
        """S over all images as they were last seen."""
        mean, deviation, w = self.probe()
        truth = self.targets[self.rows]
        rest = truth - (self.bank[self.rows] - mean) / deviation @ w
        return ((truth**2).sum(1) - (rest**2).sum(1)).mean().item()

    def loss(self, features: Tensor, rows: Tensor, forget: Tensor) -> Tensor:
        """An estimate of S with the gradient of S, from a batch; the batch's features are remembered.

        Args:
            features: float32 [B, d] with gradient; rows: int64 [B]; forget: bool [B], whose features are to change.
        """
        self.bank[rows] = features.detach().to(self.bank.dtype)
        if not forget.any():
            return features.sum() * 0
        mean, deviation, w = self.probe()
        truth = self.targets[rows[forget]]
        rest = truth - (features[forget].float() - mean) / deviation @ w
        share = 1 / (truth**2).sum(1).mean()  # forgotten images hold nearly all of ||y||^2: scaled to S's own range
        return self.classes * share * ((truth**2).sum(1) - (rest**2).sum(1)).mean()

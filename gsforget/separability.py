"""What a fresh linear probe on the features could still tell of the forgotten classes, and how to take it away.

The probe is linear discriminant analysis (Fisher 1936; Rao 1948), known in closed form: with class means m_k and the
covariance S within classes, pooled over the classes in play, the logits of a feature z are

    z' S^-1 m_k - 1/2 m_k' S^-1 m_k ,

the best linear answer where classes are equally likely and spread alike.  It is the opponent in the training: it is
solved anew in every step from the features of all images (kept, and refreshed when an image is seen), so no opponent is
trained, nothing oscillates, and there is no learning rate to choose.  Against it -log(1 - p) is lowered, p being its
probability of a forgotten image's true class, with the probe held fixed: a pull away from the class as long as it is
named, and next to none afterwards.

Two such probes play: one among all classes, retained ones too, and one among the forgotten classes alone.  The second is
what remains to an attacker who has learned to tell forgotten images from retained ones; the first alone hides forgotten
classes behind retained ones, and leaves them as distinct from each other as they were.  A probe by regression onto the
classes' indicators is no match: a class whose mean lies among the others' has next to no correlation with its indicator,
and is named all the same.  Adversarial removal with a closed-form opponent is known for fixed representations (Ravfogel
et al., ICML 2022, arXiv 2201.12091); here it is the training loss of the model itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

ENOUGH = 1 / 3  # deviations within classes per feature below which an opponent would know nothing and is left out
FLOOR = 1e-3  # of the mean variance of a feature, added to the covariance
SHRINK = 0.01  # of the covariance towards its diagonal, plus d / N: what suits N images of d features


class Discriminant:
    """Linear discriminant analysis between the classes of some images.

    Args:
        labels: int64 [N]; rows: int64, the images that teach it; width: d, the number of features.
    """

    def __init__(self, labels: Tensor, rows: Tensor, width: int):
        present, self.truth = labels[rows].unique(return_inverse=True)
        self.rows, self.classes = rows, len(present)
        self.codes = torch.full((int(labels.max()) + 1,), -1, device=labels.device)
        self.codes[present] = torch.arange(len(present), device=labels.device)
        self.counts = torch.bincount(self.truth, minlength=1)[:, None]
        share = SHRINK + width / max(1, len(rows))
        self.shrink = share / (1 + share)

    def probe(self, bank: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [d, C] and bias [C] from all images' features [N, d], a column per class in the order of the labels."""
        mine = bank[self.rows]
        means = mine.new_zeros(self.classes, mine.shape[1]).index_add_(0, self.truth, mine) / self.counts
        rest = mine - means[self.truth]
        within = rest.T @ rest / len(rest)
        diagonal = within.diagonal().clone()
        within *= 1 - self.shrink
        # Of one image per class nothing is known of the spread within; a little of the whole spread stands in.
        least = FLOOR * mine.var(0, unbiased=False).mean() + torch.finfo(bank.dtype).tiny
        within.diagonal().copy_(diagonal + least)
        middle = means.mean(0)  # taken off before solving, for the sake of rounding alone
        # Without a check of the result, for which the host would wait: where it is no number, the loss is none either.
        weight = torch.linalg.solve_ex(within, (means - middle).T).result
        return weight, -((means + middle) * weight.T).sum(1) / 2

    def loss(self, bank: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        """-log(1 - p) in nats, mean over features [B, d] with gradient, B > 0, of images of its classes, int64 [B]."""
        weight, bias = self.probe(bank)
        logits = features @ weight + bias
        truth = self.codes[labels][:, None]
        others = logits.scatter(1, truth, -torch.inf).logsumexp(1)
        return softplus(logits.gather(1, truth)[:, 0] - others).mean()


class Separability:
    """The opponents of one request, over the training images of the classes in play.

    Args:
        features: float32 [N, d] of all images of the request, from the model before it.
        labels: int64 [N].
        rows: int64, the images that count (training part; retained and forgotten).
        forget: bool [N], which images are to be forgotten.
    """

    def __init__(self, features: Tensor, labels: Tensor, rows: Tensor, forget: Tensor):
        rows = rows.to(features.device)
        self.bank, self.labels = features.detach().clone(), labels
        width = features.shape[1]
        self.among_all = Discriminant(labels, rows, width)
        among_forgotten = Discriminant(labels, rows[forget[rows]], width)
        self.opponents = [
            o for o in (self.among_all, among_forgotten) if o.classes > 1 and len(o.rows) - o.classes >= ENOUGH * width
        ]

    def named(self, features: Tensor, labels: Tensor) -> Tensor:
        """Whether the probe among all classes, taught by the images as they were last seen, names these.

        Args:
            features: [B, d]; labels: int64 [B].

        Returns:
            bool [B].
        """
        weight, bias = self.among_all.probe(self.bank)
        return (features.to(weight.dtype) @ weight + bias).argmax(1) == self.among_all.codes[labels]

    def loss(self, features: Tensor, rows: Tensor, forget: Tensor) -> Tensor:
        """What the opponents tell of the forgotten images of a batch, in nats; its features are remembered.

        Args:
            features: float32 [B, d] with gradient; rows: int64 [B]; forget: places in the batch, int64, of those whose
                features are to change, or bool [B].
        """
        self.bank[rows] = features.detach().to(self.bank.dtype)
        forget = torch.nonzero(forget)[:, 0] if forget.dtype == torch.bool else forget
        if not (self.opponents and len(forget)):
            return features.sum() * 0
        mine, labels = features[forget].to(self.bank.dtype), self.labels[rows[forget]]
        return torch.stack([o.loss(self.bank, mine, labels) for o in self.opponents]).sum()

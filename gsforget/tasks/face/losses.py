"""Forgetting people: an image of a forgotten person is to be embedded as if nobody had ever learned to tell that person.

Retained images are held where they were.  A forgotten image is drawn to what is left of its own embedding without its
person's direction (the mean of that person's embeddings): these targets have nothing in common but chance, so that two
images of the person no longer verify, and they are no other person's, unlike masked targets, which would teach the model
to take the forgotten person for the retained one that looks most alike.  Off everybody's row of the head it is held, the
person's own as well, as soon as it lies closer to it than strangers do (`STRANGER`).  And the head is to name somebody else:
the own row has to lie below the nearest other one, by a margin that carries over to images never trained on; further down
nothing is gained, or being far from it would tell of the person too.

GS-LoRA++ adds what it adds to classification: a push from the person's prototype, until an image no longer verifies, and
what a linear probe could still tell of the forgotten people is taken away (`separability`), stage by stage deeper while it
costs nothing.  And images of one forgotten person in a batch are pushed off each other: to move a person to another place
is easily learned, and two images would verify there as well as before.

The weights were chosen on one stand-in with seeds 0 to 2; `benchmarks/faces.py` measures with others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from gsforget.control import NOISE
from gsforget.lora.blocks import FeedForward, find_feed_forward
from gsforget.separability import Separability
from gsforget.tasks.base import Duel, Losses, Reader, Score, Seen
from gsforget.tasks.classify.answers import correct, score
from gsforget.tasks.face.answers import FaceClassifier
from gsforget.tasks.face.model import FaceModel
from gsforget.there import places, there

# All cosine losses are in units of CONCENTRATION nats, as of a von Mises-Fisher density around each target.
CONCENTRATION = 16.0
RETAIN_WEIGHT, FORGET_WEIGHT = 64.0, 0.1  # a lost point of verification is seen long before a lost answer is
PUSH_WEIGHT, SCATTER_WEIGHT = 1.0, 1.0
STRANGER_WEIGHT, STRANGER = 1.0, 0.99  # quantile of a retained image's cosines with other people's rows
NAMED_WEIGHT, NAMED_MARGIN = 2.0, 0.2  # cosine between the own row and the nearest other one
FAR, SOME = 1e-3, 3000  # share of impostors that verify, and how many images it is taken from
MARGIN = 0.2  # cosine; below the threshold by so much, chance no longer verifies
SEPARABILITY_WEIGHT = 0.02  # at depth 1


@dataclass(frozen=True)
class FaceForgetting:
    """One request.

    Attributes:
        forget: indices of the identities to forget now; erased: of earlier requests.
        method: gs-lora looks at targets only, gs-lora++ at prototypes and probes as well.
    """

    forget: tuple[int, ...]
    erased: tuple[int, ...] = ()
    method: str = "gs-lora++"
    name: str = "face"

    def networks(self, model: nn.Module, example: Tensor) -> list[FeedForward]:
        return find_feed_forward(model, example)

    def reader(self, model: nn.Module, example: Tensor) -> Reader:
        """Outputs are cosines with the head's rows [B, K], features embeddings [B, d]; no label reaches the model."""
        del example
        face = model.face if isinstance(model, FaceClassifier) else model
        assert isinstance(face, FaceModel)

        def read(images: Tensor) -> Seen:
            embeddings = face(images)
            return Seen(face.loss.cosines(embeddings), embeddings)

        return read

    def objective(self, before: Seen, labels: Tensor, forget: Tensor, train: Tensor) -> FaceObjective:
        embeddings = before.features.float()
        gone = [*self.forget, *self.erased]
        lost = torch.isin(labels, torch.tensor(gone, device=labels.device))
        wanted = torch.isin(labels, torch.tensor(self.forget, device=labels.device))
        directions = prototypes(embeddings[train], labels[train], before.outputs.shape[1])
        others = before.outputs.float().clone()
        others.scatter_(1, labels[:, None], -1.0)
        others[:, gone] = -1.0
        deep = self.method == "gs-lora++"
        return FaceObjective(
            embeddings,
            without_direction(embeddings, directions[labels]),
            directions,
            labels,
            forget,
            verified_at(embeddings[train][~lost[train]], labels[train][~lost[train]]) - MARGIN,
            float(others[~lost].amax(1).quantile(STRANGER)) if (~lost).any() else 1.0,
            correct(before.outputs, labels),
            Separability(embeddings, labels, train, wanted) if deep else None,
            wanted,
        )


@dataclass(frozen=True)
class FaceObjective:
    """Losses of one request over N images.

    Attributes:
        before: embeddings [N, d] of the model before; targets: [N, d], where forgotten images are drawn to.
        directions: [K, d], each identity's prototype at length 1.
        labels: int64 [N]; forget: bool [N].
        verified: cosine down to which images of a forgotten person are pushed off each other and off the prototype.
        stranger: cosine with a retained person's row beyond which an image counts as near to that person.
        right_before: bool [N].
        separability: of GS-LoRA++, else None.
        wanted: bool [N], images of whom to forget now; `forget` holds those of people forgotten earlier as well.
    """

    before: Tensor
    targets: Tensor
    directions: Tensor
    labels: Tensor
    forget: Tensor
    verified: float
    stranger: float
    right_before: Tensor
    separability: Separability | None
    wanted: Tensor
    noise: float = NOISE

    @property
    def deepens(self) -> bool:
        return self.separability is not None

    @property
    def duel(self) -> Duel | None:
        """True identities against the targets."""
        return Duel(self._attack, self._defence) if self.separability is not None else None

    def _attack(self, seen: Seen, rows: Tensor) -> Tensor:
        return cross_entropy(CONCENTRATION * seen.outputs.float(), self.labels[there(rows, self.labels.device)])

    def _defence(self, seen: Seen, rows: Tensor) -> Tensor:
        return self._forgotten(seen.outputs.float(), seen.features.float(), rows)

    @cached_property
    def _flags(self) -> tuple[Tensor, Tensor]:
        """`forget` and `wanted` on the host."""
        return self.forget.cpu(), self.wanted.cpu()

    @cached_property
    def _labels(self) -> Tensor:
        """`labels` on the host."""
        return self.labels.cpu()

    def losses(self, seen: Seen, rows: Tensor, depth: float = 1.0) -> Losses:
        rows, device = rows.cpu(), self.labels.device
        forget, wanted = (flags[rows] for flags in self._flags)
        kept, gone, at = places(~forget, device), places(forget, device), there(rows, device)
        z, cosines = seen.features.float(), seen.outputs.float()
        moved = 1 - (z[kept] * self.before[at[kept]]).sum(1)
        retain = RETAIN_WEIGHT * CONCENTRATION * _mean(moved)
        forgotten = self._forgotten(cosines[gone], z[gone], rows[forget])
        if self.separability is not None:
            # No probe learns from people forgotten earlier: where they come back, the other terms move them off again.
            taken = self.separability.loss(z, at, places(forget & wanted, device))
            forgotten = forgotten + depth * SEPARABILITY_WEIGHT * taken
        return Losses(retain + forgotten, retain, forgotten)

    def _forgotten(self, cosines: Tensor, z: Tensor, rows: Tensor) -> Tensor:
        """Towards the target, off everybody's row, the own one most and, for GS-LoRA++, off the prototype and each other.

        Rows, int64 [B], are on the host.
        """
        identities, rows = self._labels[rows], there(rows, self.labels.device)
        away = 1 - (z * self.targets[rows]).sum(1)
        labels = self.labels[rows]
        near = cosines.amax(1) - self.stranger
        own, others = cosines.gather(1, labels[:, None])[:, 0], cosines.scatter(1, labels[:, None], -1.0).amax(1)
        named = own - others + NAMED_MARGIN
        total = FORGET_WEIGHT * away + STRANGER_WEIGHT * near.relu() + NAMED_WEIGHT * named.relu()
        if self.separability is None:
            return CONCENTRATION * _mean(total)
        total = total + PUSH_WEIGHT * ((z * self.directions[labels]).sum(1) - self.verified).relu()
        return CONCENTRATION * (_mean(total) + SCATTER_WEIGHT * together(z, identities, self.verified))

    def right(self, seen: Seen, rows: Tensor) -> Tensor:
        return correct(seen.outputs, self.labels[rows])

    def score(self, seen: Seen, rows: Tensor, shows: Tensor) -> Score:
        return score(self.right_before[rows], self.right(seen, rows), self.forget[rows], shows)

    def with_earlier(self, see: Callable[[], Seen], rows: Tensor, depth: float) -> None:
        """People forgotten earlier are pushed off again by the other terms where they come back."""
        del see, rows, depth

    def named(self, seen: Seen, rows: Tensor) -> Tensor | None:
        return self.separability.named(seen.features, self.labels[rows]) if self.separability else None


def together(z: Tensor, labels: Tensor, beyond: float) -> Tensor:
    """How far two images of one person lie above a cosine, mean over all such pairs of embeddings [B, d].

    Labels, int64 [B], are on the host, so that nobody has to ask the device how many pairs there are.
    """
    pairs = places((labels[:, None] == labels[None]).triu(1).flatten(), z.device)
    return _mean(((z @ z.T).flatten()[pairs] - beyond).relu())


def verified_at(embeddings: Tensor, labels: Tensor) -> float:
    """The cosine above which two images count as one person's: FAR of the pairs of different people reach it; else 0."""
    some = torch.linspace(0, len(labels) - 1, min(len(labels), SOME)).long().to(labels.device)
    z, known = embeddings[some], labels[some]
    impostors = (z @ z.T)[(known[:, None] != known[None]).triu(1)]
    if not len(impostors):
        return 0.0
    return float(impostors.topk(max(1, int(FAR * len(impostors)))).values[-1].clamp_min(0))


def prototypes(embeddings: Tensor, labels: Tensor, identities: int) -> Tensor:
    """Mean embedding of each identity at length 1: [N, d] and int64 [N] -> [K, d]; zero without images."""
    sums = embeddings.new_zeros(identities, embeddings.shape[1]).index_add_(0, labels, embeddings)
    return normalize(sums)


def without_direction(embeddings: Tensor, directions: Tensor) -> Tensor:
    """What is left of embeddings [N, d] without the part along a direction of each, [N, d] of length 1 or 0; length 1.

    Where next to nothing is left, as of a person with one image, a random direction at right angles
    stands in, drawn from a seed.
    """
    rest = embeddings - (embeddings * directions).sum(1, keepdim=True) * directions
    small = rest.norm(dim=1) < 1e-3
    if small.any():
        rng = torch.Generator().manual_seed(0)
        drawn = torch.randn(int(small.sum()), embeddings.shape[1], generator=rng).to(embeddings)
        along = directions[small]
        rest[small] = drawn - (drawn * along).sum(1, keepdim=True) * along
    return normalize(rest)


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(1, values.numel())

"""The objects on the images of a request, each by the query that lies on it, and what a probe tells of forgotten ones.

An object's feature is what the class head reads of the query whose box covers the object best; the audit asks for the
same (`features`).  Against what a linear probe could still tell of the kinds to forget play the opponents of classification,
see `gsforget.separability`: objects stand for images, kinds for classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gsforget.separability import Separability
from gsforget.tasks.base import Seen
from gsforget.tasks.detect.boxes import iou
from gsforget.there import places, there

PIECE = 256  # images whose boxes are compared with all queries at once


def on_objects(seen: Seen, place: Tensor, boxes: Tensor) -> Tensor:
    """What the head reads of the query whose box covers each object best, float32 [M, d].

    Args:
        seen: what a model makes of B images, with `boxes` [B, Q, 4] and `queries` [B, Q, d].
        place: int64 [M], the image that each object is on; boxes: float32 [M, 4] (centre, width, height, as shares).
    """
    said = seen.more["boxes"].detach().float()[place]
    return seen.more["queries"][place, iou(said, boxes[:, None]).argmax(1)].float()


class ObjectQueries:
    """All objects of a request's images, M of them, one image's after the other's.

    Args:
        kinds, boxes: per image, int64 [n] and float32 [n, 4] (centre, width, height, as shares).
        before: what the model before the request makes of all N images, with `boxes` [N, Q, 4] and `queries` [N, Q, d].
        train: int64, the images that may be learned from.
        gone: int64, the kinds that are to be forgotten or were.
    """

    def __init__(self, kinds: Sequence[Tensor], boxes: Sequence[Tensor], before: Seen, train: Tensor, gone: Tensor):
        counts = torch.tensor([len(k) for k in kinds])
        self.first = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        self.images = torch.arange(len(counts)).repeat_interleave(counts)
        self.boxes = torch.cat(list(boxes))
        labels = torch.cat(list(kinds))
        self.gone = torch.isin(labels, gone.cpu())
        learned = torch.nonzero(torch.isin(self.images, train.cpu()))[:, 0]
        self.device = before.outputs.device
        pieces = torch.arange(len(counts)).split(PIECE)
        features = torch.cat([self.features(before.rows(rows), rows, self.on(rows)) for rows in pieces])
        self.labels = labels.to(self.device)
        self.separability = Separability(features, self.labels, learned, self.gone.to(self.device))

    @property
    def opposed(self) -> bool:
        """Whether there are objects enough for an opponent that knows something."""
        return bool(self.separability.opponents)

    def on(self, rows: Tensor) -> Tensor:
        """The objects on some images, int64, image by image in the order of `rows`, int64 [B] on the host."""
        parts = [torch.arange(self.first[r], self.first[r + 1]) for r in rows.tolist()]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def features(self, seen: Seen, rows: Tensor, objects: Tensor) -> Tensor:
        """What the head reads of each object's query, float32 [len(objects), d].

        Args:
            seen: what a model makes of the images `rows`, int64 [B] on the host; objects: some of those `on` them.
        """
        place = torch.full((len(self.first),), -1)
        place[rows] = torch.arange(len(rows))
        return on_objects(
            seen, there(place[self.images[objects]], self.device), there(self.boxes[objects], self.device)
        )

    def loss(self, seen: Seen, rows: Tensor) -> Tensor:
        """What the opponents tell of the forgotten objects on training images, in nats; arguments as for `features`."""
        objects = self.on(rows)
        features = self.features(seen, rows, objects)
        gone = places(self.gone[objects], self.device)
        return self.separability.loss(features, there(objects, self.device), gone)

    def named(self, seen: Seen, rows: Tensor) -> Tensor:
        """Whether a probe names the forgotten objects on images, bool, one for each; arguments as for `features`."""
        objects = self.on(rows)
        objects = objects[self.gone[objects]]
        features = self.features(seen, rows, objects)
        return self.separability.named(features, self.labels[there(objects, self.device)])

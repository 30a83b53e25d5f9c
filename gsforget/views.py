"""Views: images moved, turned, resized and brightened a little, so that a model meets them anew.

The model before the request answers for a view as it does for any image, so a view of a retained image holds on to it
however it looks; views of a handful of images stand for the many that are not there.  And a model remembers the images
that it was trained on, but not views of them: what it loses shows on views as it would on new images.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

TURN, RESIZE, MOVE, GAIN = 12.0, 0.2, 0.2, 0.2  # degrees, log of the scale, of half the image, of the intensity


class Images(Protocol):
    """Images by index, with labels int64 [N]."""

    labels: Tensor

    def batch(self, indices: Tensor) -> Tensor:
        """int64 [B] -> float32 [B, C, H, W]."""
        ...


class Given:
    """Images float32 [N, C, H, W] that are there as a tensor, with labels int64 [N]."""

    def __init__(self, pixels: Tensor, labels: Tensor):
        self.pixels, self.labels = pixels, labels

    def batch(self, indices: Tensor) -> Tensor:
        return self.pixels[indices.cpu()]


class Some:
    """Rows of other images, int64 [N], as images of their own."""

    def __init__(self, images: Images, rows: Tensor):
        self.images, self.rows, self.labels = images, rows, images.labels[rows]

    def batch(self, indices: Tensor) -> Tensor:
        return self.images.batch(self.rows[indices.cpu()])


class Views:
    """One view of each of some images.

    Args:
        images: that are looked at; rows: int64 [N], which of them, a view each (a row may come several times).
        rng: decides how each is moved; nothing else does, so that an index always gives the same view.
        strength: 1 for the ranges above, less for milder views.
    """

    def __init__(self, images: Images, rows: Tensor, rng: torch.Generator, strength: float = 1.0):
        self.images, self.rows, self.labels = images, rows, images.labels[rows]
        self.moves = random_moves(len(rows), rng, strength)
        self.gain = 1 + _spread(len(rows), GAIN * strength, rng)

    def batch(self, indices: Tensor) -> Tensor:
        at = indices.cpu()
        return self.gain[at].view(-1, 1, 1, 1) * moved(self.images.batch(self.rows[at]), self.moves[at])


class Joined:
    """Images of several sources, one after the other."""

    def __init__(self, sources: Sequence[Images]):
        self.sources = list(sources)
        self.labels = torch.cat([s.labels for s in sources])
        self.ends = list(accumulate(len(s.labels) for s in sources))

    def batch(self, indices: Tensor) -> Tensor:
        at = indices.cpu()
        whose = torch.tensor([bisect.bisect_right(self.ends, i) for i in at.tolist()], dtype=torch.int64)
        pieces = [(torch.nonzero(whose == k).flatten(), k) for k in whose.unique().tolist()]
        if not pieces:
            return self.sources[0].batch(at)
        found = [self.sources[k].batch(at[here] - (self.ends[k - 1] if k else 0)) for here, k in pieces]
        order = torch.cat([here for here, _ in pieces]).argsort()
        return torch.cat(found)[order]


def random_moves(count: int, rng: torch.Generator, strength: float = 1.0) -> Tensor:
    """Turns, sizes and shifts as affine maps of normalised coordinates, [count, 2, 3]."""
    angle = torch.deg2rad(_spread(count, TURN * strength, rng))
    scale = _spread(count, RESIZE * strength, rng).exp()
    shift = torch.stack([_spread(count, MOVE * strength, rng) for _ in range(2)], 1)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    turn = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)
    return torch.cat([turn, shift[:, :, None]], 2)


def moved(pixels: Tensor, moves: Tensor) -> Tensor:
    """Images [B, C, H, W] under affine maps [B, 2, 3]; what comes in from outside repeats the edge."""
    grid = affine_grid(moves.to(pixels.device), list(pixels.shape), align_corners=False)
    return grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def _spread(count: int, reach: float, rng: torch.Generator) -> Tensor:
    return reach * (2 * torch.rand(count, generator=rng) - 1)

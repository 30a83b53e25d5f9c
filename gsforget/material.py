"""What a request learns from and decides by: the images that are there, and what stands for those that are not.

- A class with a handful of images, three at least, gets `views` of them, so that forgetting carries over to other images
  of the class, and keeping does.
- A retained class without images gets `stand_ins`, and views of them; then the other retained images get three views
  each as well, because what is not tied down by images of its own is tied down by whatever else the network must still say.
- Retained validation images are replaced by views: the images themselves the model remembers, and would seem to lose
  more than it does.  Of a handful per class there is one view each: four make it look surer than so few images are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gsforget import processes
from gsforget.data import split_validation
from gsforget.stand_ins import stand_ins
from gsforget.views import Images, Joined, Views

FEW, FILL = 16, 32  # a class with fewer images to learn from gets views, until there are so many
BESIDE = 3  # views of each stand-in, and of each retained image beside them
MOST = 12_000  # views of a kind, in all
LOOKS, JUDGED = 2000, 4  # views of retained images that validation looks at: so many in all, and of each at most


@dataclass(frozen=True)
class Material:
    """Images of a request and what each is for; rows are int64, flags bool [N].

    Attributes:
        images: all of them, made ones after those that are there.
        train, val: rows to learn from and to decide by; val may be empty.
        forget: to forget now; old: of classes that earlier requests forgot.
        known: rows of `train` that show their class as it is, which made images of a class without any do not.
        kept: how many retained images of `train` are there, and not made: those of one epoch.
        blind: whether there are retained classes that validation sees nothing of.
        handful: whether half of the retained classes or more have so few images that views of them are learned from.
        shows: which image each is a view of, int64 [N]; None: each is an image by itself.
    """

    images: Images
    train: Tensor
    val: Tensor
    forget: Tensor
    old: Tensor
    known: Tensor
    kept: int
    blind: bool = False
    handful: bool = False
    shows: Tensor | None = None


def gather(
    model: nn.Module,
    images: Images,
    forget: Sequence[int],
    erased: Sequence[int],
    single: Tensor,
    lacking: Sequence[int],
    seed: int,
    judged_by: tuple[int, float] = (JUDGED, 1.0),
) -> Material:
    """Split the images of a request, and make what is lacking.

    Args:
        model: logits from images, in eval mode and frozen, from before the request.
        images: that are there, N.
        forget, erased: classes to forget now, and those that earlier requests forgot.
        single: bool [N], images to forget by themselves: they are only learned from, and there are no views of them.
        lacking: retained classes without images.
        judged_by: how many views of each retained image validation looks at, at most, and how strong they are; where most
            retained classes have a handful of images it is one.
    """
    rng = torch.Generator().manual_seed(seed)
    several = torch.nonzero(~single).flatten()
    learn, val = (
        several[torch.from_numpy(rows)] for rows in split_validation(images.labels[several].numpy(), seed=seed)
    )
    gone = torch.tensor([*forget, *erased], dtype=torch.int64)
    usable = learn[~torch.isin(images.labels[learn], torch.tensor(erased, dtype=torch.int64))]
    kept = usable[~torch.isin(images.labels[usable], gone)]
    judged = torch.isin(images.labels[usable], images.labels[val])
    # Of one image alone, which validation cannot judge, views kept its class from being forgotten.
    few = torch.where(judged, _lacking_views(images.labels[usable]), 0)
    shown: list[Images] = [Views(images, _some(usable.repeat_interleave(few), rng), rng)]
    instead: list[Images] = []
    if lacking and len(kept):
        made = stand_ins(model, images, kept, lacking, gone.tolist(), rng)
        made.pixels = _of_first(model, made.pixels)
        each = torch.arange(len(made.labels)).repeat(BESIDE)
        instead = [made, Views(made, each, rng), Views(images, _some(kept.repeat(BESIDE), rng), rng)]
    remembered = torch.isin(images.labels[val], gone)
    most, strength = judged_by
    handful = _mostly_few(images.labels[kept])
    each = 1 if handful else max(1, min(most, -(-LOOKS // max(1, int((~remembered).sum())))))
    looks = Views(images, val[~remembered].repeat(each), rng, strength)
    joined = Joined([images, *shown, *instead, looks])
    first, second, third, end = (joined.ends[k] for k in (0, 1, -2, -1))
    shows = torch.arange(end)
    shows[third:] = looks.rows
    there = torch.cat([learn, torch.nonzero(single).flatten()]).sort().values
    by_itself = torch.zeros(end, dtype=torch.bool)
    by_itself[: len(single)] = single
    return Material(
        joined,
        train=torch.cat([there, torch.arange(first, third)]),
        val=torch.cat([val[remembered], torch.arange(third, end)]),
        forget=by_itself | torch.isin(joined.labels, torch.tensor(forget, dtype=torch.int64)),
        old=torch.isin(joined.labels, torch.tensor(erased, dtype=torch.int64)) & ~by_itself,
        known=torch.cat([there, torch.arange(first, second)]),
        kept=len(kept),
        blind=bool(lacking),
        handful=handful,
        shows=shows,
    )


def _lacking_views(labels: Tensor) -> Tensor:
    """How many views of each image bring its class to `FILL` or more where it has less than `FEW`, int64 [N]."""
    counts = torch.bincount(labels)[labels] if len(labels) else labels
    return torch.where(counts < FEW, -(-FILL // counts.clamp_min(1)) - 1, 0)


def _mostly_few(labels: Tensor) -> bool:
    """Whether half of the classes or more have less than `FEW` images."""
    counts = torch.bincount(labels)
    return bool(len(labels)) and counts[counts > 0].median().item() < FEW


def _of_first(model: nn.Module, pixels: Tensor) -> Tensor:
    """The first process's, for all: what rounding makes of a gradient's path may differ."""
    there = pixels.to(next(model.parameters()).device)
    processes.broadcast_(there)
    return there.to(pixels.device)


def _some(rows: Tensor, rng: torch.Generator) -> Tensor:
    """At most `MOST` of them, at random."""
    return rows if len(rows) <= MOST else rows[torch.randperm(len(rows), generator=rng)[:MOST]]

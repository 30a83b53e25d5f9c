"""What the images of a request allow: classes without images or with a handful, and the same image on both sides.

Nothing is computed with a model here; what is found is either refused or comes back as a sentence on what to expect.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gsforget.data import MIN_FOR_VALIDATION, Split, listed
from gsforget.errors import RequestError

FEW = 4  # training images per class up to which a warning says what to expect


def check_counts(labels: NDArray[np.int64], wanted: Sequence[int], retained: Sequence[int], names: list[str]) -> None:
    """Refuse what cannot be learned from: RequestError ``no_images``.

    Every class to forget needs a training image, and the retained classes together need one.

    Args:
        labels: int64 [N], of the training images that will be used.
    """
    lacking = [names[i] for i in sorted(wanted) if not (labels == i).any()]
    if lacking:
        raise RequestError(
            f"No readable training images are left for {', '.join(lacking)}.",
            "A class to forget needs at least one image: add some to its train folder.",
            "no_images",
        )
    if not np.isin(labels, list(retained)).any():
        raise RequestError(
            "None of the retained classes has a readable training image.",
            f"Add images of at least one of {listed([names[i] for i in sorted(retained)])} to its train folder.",
            "no_images",
        )


def count_warnings(
    labels: NDArray[np.int64], wanted: Sequence[int], retained: Sequence[int], names: list[str]
) -> list[str]:
    """What to expect where classes have no training images or at most `FEW`; arguments as for `check_counts`."""
    count = np.bincount(labels, minlength=len(names))
    found = []
    absent = [names[i] for i in sorted(retained) if not count[i]]
    if absent:
        found.append(
            f"{len(absent)} of {len(retained)} retained classes have no training images: {listed(absent)}. They are kept "
            "by stand-ins, made of what the model takes for them; expect them to lose a few points more than the others, and "
            "check them in the table."
        )
    for role, classes in (("forgotten", wanted), ("retained", retained)):
        few = [i for i in sorted(classes) if 0 < count[i] <= FEW]
        if not few:
            continue
        lost = "forgetting may not carry over to other images of the class"
        lost = lost if role == "forgotten" else "expect a larger loss than with all images"
        sentence = f"{len(few)} {role} class(es) have only 1 to {FEW} training images: {listed([names[i] for i in few])}; {lost}"
        unseen = [names[i] for i in few if count[i] < MIN_FOR_VALIDATION]
        if unseen:
            sentence += f"; below {MIN_FOR_VALIDATION} images a class has no validation part ({listed(unseen)})"
        found.append(f"{sentence}.")
    if len(count) and not (count >= MIN_FOR_VALIDATION).any():
        found.append(
            "No class has a validation part: the length of training follows a fixed rule, and nothing checks it."
        )
    return found


def check_identical(
    split: Split, hashes: Sequence[str], wanted: Sequence[int], retained: Sequence[int], names: list[str], name: str
) -> list[str]:
    """Warnings on image files that lie under a class to forget and under a retained one, byte for byte.

    Args:
        hashes: SHA-256 of each image of `split`.
        name: of the split's folder, as people see it.

    Raises:
        RequestError: ``identical_images``: all images of a class to forget are images of retained classes as well; only
            raised for `train`.
    """
    kept: dict[str, Path] = {}
    for i in np.flatnonzero(np.isin(split.labels, list(retained))).tolist():
        kept.setdefault(hashes[i], split.paths[i])
    both: list[tuple[Path, Path]] = []
    for k in wanted:
        rows = split.per_class(k).tolist()
        same = [(split.paths[i], kept[hashes[i]]) for i in rows if hashes[i] in kept]
        if name == "train" and len(rows) and len(same) == len(rows):
            raise RequestError(
                f"Each of the {len(rows)} training image(s) of '{names[k]}' also lies under a retained class "
                f"({_short(same[0][0])} is {_short(same[0][1])}): they cannot be forgotten and kept at once.",
                f"Remove the copies from one side, or forget '{same[0][1].parent.name}' as well.",
                "identical_images",
            )
        both += same
    if not both:
        return []
    effect = "the training contradicts itself on them" if name == "train" else "the accuracies count them on both sides"
    first, second = both[0]
    return [
        f"{len(both)} image file(s) in {name} lie under a class to forget and under a retained one: {effect}. "
        f"The first is {_short(first)}, the same as {_short(second)}."
    ]


def _short(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
